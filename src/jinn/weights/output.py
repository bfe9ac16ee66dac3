"""A tensor on its way to a file: its description, and its bytes in pieces small enough for memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from jinn.weights.block_formats import BlockFormat

_T = TypeVar("_T")

Progress = Callable[[int, int], None]
"""Takes the bytes written so far, and all."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """`chunks` gives its bytes in order, uint8 arrays of any size; it is called once, when it is written."""

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[npt.NDArray[np.uint8]]]

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)

    def write(self, file: BinaryIO, count: Callable[[int], None]) -> None:
        """Append the bytes, telling `count` how many after each piece. Raises ValueError on a wrong size."""
        start = file.tell()
        for chunk in self.chunks():
            file.write(chunk.data)
            count(chunk.nbytes)
        written = file.tell() - start
        if written != self.nbytes:
            raise ValueError(f"tensor {self.name!r} takes {self.nbytes} bytes, and was given {written}")


def total_progress(tensors: Sequence[OutputTensor], progress: Progress) -> Callable[[int], None]:
    """A counter of bytes written, for `OutputTensor.write`, that tells `progress` of the sum."""
    done, total = 0, sum(tensor.nbytes for tensor in tensors)

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress(done, total)

    return count


def in_order(pool: Executor, num_ahead: int, tasks: Iterable[Callable[[], _T]]) -> Iterator[_T]:
    """What each task returns; up to `num_ahead` run in `pool` before they are needed."""
    pending: deque[Future[_T]] = deque()
    for task in tasks:
        pending.append(pool.submit(task))
        if len(pending) > num_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
