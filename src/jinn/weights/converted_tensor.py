"""A tensor that becomes another: converted piece by piece, in order, with the error measured on the way."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from math import sqrt

import numpy as np
import numpy.typing as npt

from jinn.weights.block_formats import BlockFormat
from jinn.weights.errors import WeightsError, quoted
from jinn.weights.output import OutputTensor, in_order
from jinn.weights.quantize import dequantize, quantize
from jinn.weights.rearrange import Assembly

_CHUNK_ELEMS = 1 << 20
_ENCODING_ERROR = 1e-6  # of 1 + weight and of -exp(A_log), in float32 and back


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What became of a tensor: `rms_error` is relative to its root mean square, `max_error` absolute."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    rms_error: float
    max_error: float


@dataclass(slots=True)
class _Errors:
    """Sums over the values so far."""

    squares: float = 0.0
    squared_errors: float = 0.0
    largest: float = 0.0

    def add(self, other: _Errors) -> None:
        self.squares += other.squares
        self.squared_errors += other.squared_errors
        self.largest = max(self.largest, other.largest)


class ConvertedTensor:
    """`assembly` in the type `block_format`."""

    def __init__(self, assembly: Assembly, block_format: BlockFormat) -> None:
        self.assembly, self.format = assembly, block_format
        self._errors = _Errors()

    def output(self, pool: Executor, num_ahead: int) -> OutputTensor:
        """The tensor to write; up to `num_ahead` pieces are converted in `pool` before they are needed."""

        def chunks() -> Iterator[npt.NDArray[np.uint8]]:
            tasks = (partial(self._convert, *part) for part in self._ranges())
            for data, errors in in_order(pool, num_ahead, tasks):
                self._errors.add(errors)
                yield data
            self.assembly.release()

        return OutputTensor(self.assembly.name, self.format, self.assembly.shape, chunks)

    def report(self) -> TensorReport:
        """What became of it, once it is written."""
        errors = self._errors
        relative = sqrt(errors.squared_errors / errors.squares) if errors.squares else 0.0
        source = self.assembly.source_format.name
        return TensorReport(
            self.assembly.name, self.assembly.shape, source, self.format.name, relative, errors.largest
        )

    def is_exact(self) -> bool:
        """Whether the type holds all values as they are, but for what a file's own encoding rounds."""
        limit = _ENCODING_ERROR if self.assembly.is_encoded else 0.0
        return all(self._convert(*part)[1].largest <= limit for part in self._ranges())

    def _ranges(self) -> Iterator[tuple[int, int, int]]:
        """Matrices, and ranges of their rows."""
        assembly = self.assembly
        step = max(1, _CHUNK_ELEMS // assembly.num_columns)
        for matrix in range(assembly.num_matrices):
            for start in range(0, assembly.num_rows, step):
                yield matrix, start, min(start + step, assembly.num_rows)

    def _convert(self, matrix: int, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], _Errors]:
        assembly = self.assembly
        if assembly.is_plain and assembly.source_format is self.format:
            return assembly.row_bytes(matrix, start, stop).reshape(-1), _Errors()
        values = np.ascontiguousarray(assembly.values(matrix, start, stop), np.float32)
        # a vector's matrix has one column, but is one row in the file
        rows = values.reshape(1, -1) if len(assembly.shape) < 2 else values
        try:
            data = quantize(rows, self.format)
        except ValueError as error:
            raise WeightsError(f"tensor {quoted(assembly.name)}: {error}") from None
        stored = dequantize(data, self.format, rows.shape)
        stored -= rows
        return data, _Errors(_square_sum(rows), _square_sum(stored), float(np.abs(stored).max(initial=0)))


def _square_sum(values: npt.NDArray[np.float32]) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))
