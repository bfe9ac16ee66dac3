"""A file read in two ways: copies for headers, a read-only memory map for tensors.

Touching a mapped page that the file no longer has ends the process (SIGBUS). So headers are never parsed
through the map, and `view` refuses a file that has shrunk since it was opened. What stays open is a file cut
short while a view is being read, which is while weights are packed: packed weights no longer need the file.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jinn.weights.errors import WeightsError


class MappedFile:
    """A regular, non-empty file, held open. Raises WeightsError naming it otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # O_NONBLOCK: opening a pipe must not wait for its writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise WeightsError(f"{path}: not a regular file")
            if status.st_size == 0:
                raise WeightsError(f"{path}: the file is empty")
            self.size = status.st_size
            self._map: mmap.mmap | None = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, offset: int, nbytes: int) -> bytes:
        """A copy of `nbytes` bytes at `offset`."""
        pieces = []
        while nbytes:
            piece = os.pread(self._fd, nbytes, offset)
            if not piece:
                raise WeightsError(f"{self.path}: the file was cut short at byte {offset} while being read")
            pieces.append(piece)
            offset, nbytes = offset + len(piece), nbytes - len(piece)
        return b"".join(pieces)

    def view(self, offset: int = 0, nbytes: int | None = None) -> npt.NDArray[np.uint8]:
        """Bytes `offset` to `offset + nbytes` (or the end), uint8, read-only; stays valid after `close`."""
        if self._map is None:
            raise WeightsError(f"{self.path}: already closed")
        if os.fstat(self._fd).st_size < self.size:
            raise WeightsError(f"{self.path}: the file was cut short after it was opened")
        whole = np.frombuffer(self._map, np.uint8)
        return whole[offset : self.size if nbytes is None else offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Let the kernel drop the pages wholly inside this range; they are read again when touched."""
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and start < end:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Close the file. The map itself goes when the last view does."""
        if self._map is not None:
            self._map = None
            os.close(self._fd)
