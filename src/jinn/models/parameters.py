"""A model's parameters: what it declares, where a checkpoint keeps them, and the tree that blocks read."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from jinn.ops.protocol import FloatArray, IntArray

Array = npt.NDArray[Any]
Parallel = Literal["column", "row", "expert", "replicated"]
"""How tensor parallelism splits a weight: by rows, by columns or experts (summing the results), or not."""


class Layout(Protocol):
    """How a file keeps a model: an open checkpoint, or a `NewFile`."""

    @property
    def kind(self) -> Literal["gguf", "hf"]: ...

    @property
    def tensors(self) -> Container[str]:
        """Names in the file: which of several known ways it has. Without any, it is the way of today."""
        ...


@dataclass(frozen=True, slots=True)
class NewFile:
    """The layout of a file that is to be written."""

    kind: Literal["gguf", "hf"]
    tensors: Container[str] = ()


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter [out, in] of a linear or embedding, [experts, out, in], or [features] of a norm or bias."""

    shape: tuple[int, ...]
    parallel: Parallel = "replicated"
    num_experts_per_tok: int | None = None  # that a token reads; None: all of the parameter
    keeps_float32: bool = False  # a matrix that is read as plain numbers, as vectors are

    @property
    def is_packed(self) -> bool:
        """Whether it is held in its file's format, in tiles for the kernels."""
        return len(self.shape) > 1 and not self.keeps_float32

    @property
    def active_size(self) -> int:
        """Numbers that one token reads."""
        if self.num_experts_per_tok is None:
            return prod(self.shape)
        return self.num_experts_per_tok * prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Encoding:
    """A file's own way to write float32 numbers: `decode` gives the parameter's, `encode` the file's."""

    decode: Callable[[FloatArray], FloatArray]
    encode: Callable[[FloatArray], FloatArray]


PLUS_ONE = Encoding(lambda stored: stored - np.float32(1), lambda values: values + np.float32(1))
NEGATIVE_EXP = Encoding(lambda stored: np.log(-stored), lambda values: -np.exp(values))


@dataclass(frozen=True, slots=True)
class Origin:
    """The tensors of a file behind a parameter, and what was done to it; `read` and `write` are inverses.

    A parameter [experts, out, in] is one tensor, or `num_experts` tensors [out, in] whose `name` has {} for
    the expert's number. The other fields hold for each of its matrices. Row i is row `rows[i]` of the file's
    matrix, which may have further rows; column j is column `columns[j]`; None leaves them as they are.
    """

    name: str
    num_experts: int | None = None
    shape: tuple[int, ...] | None = None  # of each tensor, where it is not the parameter's
    rows: IntArray | None = None
    columns: IntArray | None = None
    is_transposed: bool = False  # the rows so chosen are the parameter's columns
    encoding: Encoding | None = None

    @property
    def moves_columns(self) -> bool:
        """Whether a row has other numbers than a row of the file, or in another order."""
        return self.is_transposed or self.columns is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        if self.num_experts is None:
            return (self.name,)
        return tuple(self.name.format(expert) for expert in range(self.num_experts))

    def shape_of(self, spec: ParameterSpec) -> tuple[int, ...]:
        """The shape of each tensor of this parameter."""
        if self.shape is not None:
            return self.shape
        return spec.shape if self.num_experts is None else spec.shape[1:]

    def read(self, tensors: Sequence[Array], spec: ParameterSpec) -> Array:
        """The parameter's values. Tensors have `shape_of(spec)`, and float32 where there is an `encoding`."""
        whole = tensors[0] if self.num_experts is None else np.stack(tensors)
        values = whole.reshape(self._matrices(spec))
        if self.rows is not None:
            values = values.take(self.rows, axis=max(values.ndim - 2, 0))
        if self.columns is not None:
            values = values.take(self.columns, axis=-1)
        if self.is_transposed:
            values = values.swapaxes(-1, -2)
        if self.encoding is not None:
            values = self.encoding.decode(values)
        return np.ascontiguousarray(values).reshape(spec.shape)

    def write(self, values: Array, tensors: Sequence[Array], spec: ParameterSpec) -> None:
        """Put the parameter's values into its tensors; what the file's matrices have besides stays."""
        if self.encoding is not None:
            values = self.encoding.encode(values)
        if self.is_transposed:
            values = values.swapaxes(-1, -2)
        if self.columns is not None:
            values = values.take(np.argsort(self.columns), axis=-1)
        rows = slice(None) if self.rows is None else self.rows
        parts = [values] if self.num_experts is None else values
        for part, tensor in zip(parts, tensors, strict=True):
            stored = tensor.view()
            stored.shape = self._matrices(spec)[-part.ndim :]  # unlike reshape, never a copy
            stored[(..., rows) if part.ndim == 1 else (..., rows, slice(None))] = part

    def _matrices(self, spec: ParameterSpec) -> tuple[int, ...]:
        """The shape of the file's matrices, all of them, before `rows` are chosen."""
        if len(spec.shape) == 1:
            return (-1,)
        return (*spec.shape[:-2], -1, spec.shape[-2] if self.is_transposed else spec.shape[-1])


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
