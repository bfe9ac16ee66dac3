"""A model's parameters: what it declares, where a checkpoint keeps them, and the tree that blocks read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Parallel = Literal["column", "row", "replicated"]
"""How tensor parallelism splits a weight: by rows, by columns (and sums the results), or not at all."""


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter [out, in] of a linear or embedding, or [features] of a norm or bias."""

    shape: tuple[int, ...]
    parallel: Parallel = "replicated"


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint's tensor behind a parameter; row `i` is its row `row_order[i]` (None: row `i`)."""

    name: str
    row_order: npt.NDArray[np.int32] | None = None


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
