"""A model's parameters: what it declares, where a checkpoint keeps them, and the tree that blocks read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Parallel = Literal["column", "row", "expert", "replicated"]
"""How tensor parallelism splits a weight: by rows, by columns or experts (summing the results), or not."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter [out, in] of a linear or embedding, [experts, out, in], or [features] of a norm or bias."""

    shape: tuple[int, ...]
    parallel: Parallel = "replicated"
    num_experts_per_tok: int | None = None  # that a token reads; None: all of the parameter

    @property
    def active_size(self) -> int:
        """Numbers that one token reads."""
        if self.num_experts_per_tok is None:
            return prod(self.shape)
        return self.num_experts_per_tok * prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint's tensor behind a parameter; row `i` is its row `row_order[i]` (None: row `i`).

    A parameter [experts, out, in] is one tensor, or `num_experts` tensors [out, in] whose `name` has {} for
    the expert's number. `row_order` is that of each expert, `num_rows` its rows where it holds others too.
    """

    name: str
    row_order: npt.NDArray[np.int32] | None = None
    num_experts: int | None = None
    num_rows: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        if self.num_experts is None:
            return (self.name,)
        return tuple(self.name.format(expert) for expert in range(self.num_experts))

    def shape_of(self, spec: ParameterSpec) -> tuple[int, ...]:
        """The shape of each tensor of this parameter."""
        shape = spec.shape if self.num_experts is None else spec.shape[1:]
        return shape if self.num_rows is None else (*shape[:-2], self.num_rows, shape[-1])


class Node:
    """One level of the parameter tree: `root.model.layers[0].self_attn.q_proj.weight`."""

    def __init__(self) -> None:
        self._items: list[Node] = []

    def __getitem__(self, index: int) -> Node:
        return self._items[index]

    def __iter__(self) -> Iterator[Node]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no parameter {name!r} here; there are {sorted(vars(self))}")


def tree(parameters: Mapping[str, Any]) -> Node:
    """The tree of parameters named by checkpoint key; numbers become list items, in order."""
    root = Node()
    for key in sorted(parameters, key=lambda name: [int(p) if p.isdigit() else -1 for p in name.split(".")]):
        *path, leaf = key.split(".")
        node = root
        for part in path:
            node = _child(node, part, key)
        setattr(node, leaf, parameters[key])
    return root


def _child(node: Node, part: str, key: str) -> Node:
    if part.isdigit():
        if int(part) == len(node):
            node._items.append(Node())
        if int(part) >= len(node):
            raise ValueError(f"parameter {key!r}: number {len(node)} of this list is missing")
        return node[int(part)]
    if part not in vars(node):
        setattr(node, part, Node())
    child: Node = getattr(node, part)
    return child
