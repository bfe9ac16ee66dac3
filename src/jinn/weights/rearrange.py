"""Rows of a file's tensor made from rows of another file's, a piece at a time.

Between two files stand the model's parameters: each file has its own places for them (`Origin`), and a tensor
to be written is put together from those that it holds. A parameter [..., rows, columns] counts as matrices,
one for each expert or head; a vector as a matrix of one column.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from jinn.models.parameters import Origin, ParameterSpec
from jinn.weights.block_formats import BlockFormat
from jinn.weights.checkpoint import Checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.quantize import dequantize

ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.intp]
_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a parameter as matrices."""

    num_matrices: int
    num_rows: int
    num_columns: int

    @classmethod
    def of(cls, spec: ParameterSpec) -> Shape:
        if len(spec.shape) == 1:
            return cls(1, spec.shape[0], 1)
        *matrices, rows, columns = spec.shape
        return cls(prod(matrices), rows, columns)


class StoredParameter:
    """A parameter as an open checkpoint keeps it."""

    def __init__(self, checkpoint: Checkpoint, spec: ParameterSpec, origin: Origin) -> None:
        infos = [checkpoint.tensors[name] for name in origin.names]
        if len({info.format for info in infos}) > 1:
            raise WeightsError(f"{checkpoint.path}: tensors {origin.name!r} have different types")
        self.format: BlockFormat = infos[0].format
        self.shape = Shape.of(spec)
        self.origin = origin
        self._checkpoint = checkpoint
        self._stored_columns = self.shape.num_rows if origin.is_transposed else self.shape.num_columns

    @property
    def is_plain(self) -> bool:
        """Whether its rows are rows of the file, as they are."""
        origin = self.origin
        return not origin.moves_columns and origin.encoding is None

    def row_bytes(self, matrix: int, rows: IntArray) -> ByteArray:
        """Rows of a parameter that is plain, as the file has them: bytes [n, row bytes]."""
        stored = self._stored_matrix(matrix)
        order = self.origin.rows
        return stored[rows if order is None else order[rows]]

    def values(self, matrix: int, rows: IntArray) -> FloatArray:
        """Rows of the parameter: float32 [n, columns]."""
        origin = self.origin
        if origin.is_transposed:
            whole = self._dequantized(self._stored_matrix(matrix))
            chosen = whole if origin.rows is None else whole[origin.rows]
            values = chosen.T[rows]
        else:
            order = origin.rows
            values = self._dequantized(self._stored_matrix(matrix)[rows if order is None else order[rows]])
        if origin.columns is not None:
            values = values[:, origin.columns]
        return values if origin.encoding is None else origin.encoding.decode(values)

    def release(self) -> None:
        """Drop its pages from memory."""
        for name in self.origin.names:
            self._checkpoint.release(name)

    def _stored_matrix(self, matrix: int) -> ByteArray:
        """The file's matrix behind one of the parameter's: bytes [rows, row bytes]."""
        name = self.origin.name
        if self.origin.num_experts is None:
            data: ByteArray = self._checkpoint.data(name).reshape(self.shape.num_matrices, -1)[matrix]
        else:
            data = self._checkpoint.data(name.format(matrix))
        return data.reshape(-1, self.format.nbytes((self._stored_columns,)))

    def _dequantized(self, rows: ByteArray) -> FloatArray:
        shape = (len(rows), self._stored_columns)
        return dequantize(np.ascontiguousarray(rows).reshape(-1), self.format, shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter that a tensor to be written holds, its place there, and its matrix that goes in first.

    `first_matrix` is an expert's number where each has a tensor.
    """

    parameter: StoredParameter
    origin: Origin
    first_matrix: int = 0

    @property
    def is_plain(self) -> bool:
        origin = self.origin
        is_moved = origin.moves_columns or origin.encoding is not None
        return self.parameter.is_plain and not is_moved

    @property
    def num_rows(self) -> int:
        """Rows of each matrix that it fills."""
        shape = self.parameter.shape
        return shape.num_columns if self.origin.is_transposed else shape.num_rows

    @property
    def num_columns(self) -> int:
        shape = self.parameter.shape
        return shape.num_rows if self.origin.is_transposed else shape.num_columns

    def stored_values(self, matrix: int, rows: IntArray) -> FloatArray:
        """What goes into the tensor's rows that the parameter's `rows` (or columns, if transposed) fill."""
        matrix += self.first_matrix
        shape, origin = self.parameter.shape, self.origin
        if origin.is_transposed:
            values = self.parameter.values(matrix, np.arange(shape.num_rows)).T[rows]
        else:
            values = self.parameter.values(matrix, rows)
        if origin.columns is not None:
            values = values[:, np.argsort(origin.columns)]
        return values if origin.encoding is None else origin.encoding.encode(values)


class Assembly:
    """A tensor to be written, of matrices [num_rows, num_columns] that its pieces fill.

    Raises WeightsError where they leave rows out or overlap.
    """

    def __init__(self, name: str, shape: tuple[int, ...], pieces: list[Piece]) -> None:
        self.name, self.shape, self.pieces = name, shape, pieces
        self.num_columns = pieces[0].num_columns
        self.num_rows = sum(piece.num_rows for piece in pieces)
        self.num_matrices = prod(shape) // (self.num_rows * self.num_columns)
        self._owner = np.full(self.num_rows, -1)
        self._row = np.zeros(self.num_rows, np.intp)
        for number, piece in enumerate(pieces):
            rows = np.arange(piece.num_rows) if piece.origin.rows is None else piece.origin.rows
            if rows.max() >= self.num_rows or (self._owner[rows] >= 0).any():
                raise WeightsError(f"tensor {name!r} cannot be put together from the model's parameters")
            self._owner[rows] = number
            self._row[rows] = np.arange(piece.num_rows)

    @property
    def source_format(self) -> BlockFormat:
        """The type of its parts."""
        return self.pieces[0].parameter.format

    @property
    def is_encoded(self) -> bool:
        """Whether a file on either side has other numbers than the parameter."""
        origins = [origin for piece in self.pieces for origin in (piece.origin, piece.parameter.origin)]
        return any(origin.encoding is not None for origin in origins)

    @property
    def is_plain(self) -> bool:
        """Whether each row is a row of the file that is read, as it is."""
        formats = {piece.parameter.format for piece in self.pieces}
        return len(formats) == 1 and all(piece.is_plain for piece in self.pieces)

    def row_bytes(self, matrix: int, start: int, stop: int) -> ByteArray:
        """Rows of a tensor that is plain: bytes [stop - start, row bytes]."""
        parts = [
            (mask, piece.parameter.row_bytes(piece.first_matrix + matrix, rows))
            for mask, piece, rows in self._parts(start, stop)
        ]
        return _joined(parts, stop - start)

    def values(self, matrix: int, start: int, stop: int) -> FloatArray:
        """Rows: float32 [stop - start, columns]."""
        parts = [(mask, piece.stored_values(matrix, rows)) for mask, piece, rows in self._parts(start, stop)]
        return _joined(parts, stop - start)

    def release(self) -> None:
        """Drop what was read from memory."""
        for piece in self.pieces:
            piece.parameter.release()

    def _parts(self, start: int, stop: int) -> list[tuple[npt.NDArray[np.bool_], Piece, IntArray]]:
        owner, row = self._owner[start:stop], self._row[start:stop]
        masks = [(owner == number, piece) for number, piece in enumerate(self.pieces)]
        return [(mask, piece, row[mask]) for mask, piece in masks if mask.any()]


def _joined(parts: list[tuple[npt.NDArray[np.bool_], npt.NDArray[_T]]], num_rows: int) -> npt.NDArray[_T]:
    if len(parts) == 1:
        return parts[0][1]
    joined = np.empty((num_rows, parts[0][1].shape[1]), parts[0][1].dtype)
    for mask, rows in parts:
        joined[mask] = rows
    return joined
