"""Packed experts kept in a file, so that kernels read them through a map and only what they need.

A checkpoint's experts are packed once. The file has them at page boundaries, behind a header in JSON: its key
and its tensors' places. It is written beside, and renamed once it is whole and on disk, so that a file
that is there is whole. Processes that start together wait for the one that writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from jinn.weights.errors import WeightsError

PAGE = 4096
_KEY_LENGTH = 32


class PackedFile:
    """The packed experts of one checkpoint, of known sizes, under `folder`. A context manager.

    Until `is_whole`, each tensor's bytes are to be written to its place; then `finish` makes the file known.
    Raises WeightsError where it cannot be written or has no room.
    """

    def __init__(self, folder: Path, key: str, sizes: Mapping[str, int]) -> None:
        self._header, self._offsets, self._size = _layout(key, sizes)
        self._final = folder / f"{key}.packed"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / f"{key}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise WeightsError(f"{folder}: packed experts cannot be kept here: {error.strerror}") from None
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.is_whole = self._is_there()
        self.path = self._final if self.is_whole else folder / f"{key}.part"

    def __enter__(self) -> Self:
        try:
            if not self.is_whole:
                self._reserve()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def offset(self, name: str) -> int:
        """Where a tensor's bytes begin."""
        return self._offsets[name]

    def finish(self) -> None:
        """Put what was written on disk, and the file in its place."""
        if self.is_whole:
            return
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())
            file.write(self._header)
            file.flush()
            os.fsync(file.fileno())
        self.path.rename(self._final)
        self.path, self.is_whole = self._final, True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.is_whole:
            self.path.unlink(missing_ok=True)
        os.close(self._lock)

    def _is_there(self) -> bool:
        try:
            with self._final.open("rb") as file:
                return (
                    os.fstat(file.fileno()).st_size == self._size
                    and file.read(len(self._header)) == self._header
                )
        except OSError:
            return False

    def _reserve(self) -> None:
        """Room on disk for all of it, before hours may go by."""
        try:
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            disk = os.statvfs(self.path.parent)
            raise WeightsError(
                f"{self.path.parent}: no room for {self._size} bytes of packed experts, "
                f"{disk.f_bavail * disk.f_frsize} are free: {error.strerror}"
            ) from None


def packed_key(*parts: object) -> str:
    """A name for what a packed file was made of."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_KEY_LENGTH]


def _layout(key: str, sizes: Mapping[str, int]) -> tuple[bytes, dict[str, int], int]:
    """The header in whole pages, each tensor's offset, and the size of it all."""
    header_bytes = _pages(len(json.dumps([key, {name: [2**62, n] for name, n in sizes.items()}])))
    offsets, end = {}, header_bytes
    for name, nbytes in sizes.items():
        offsets[name] = end
        end += _pages(nbytes)
    places = {name: [offsets[name], nbytes] for name, nbytes in sizes.items()}
    return json.dumps([key, places]).encode().ljust(header_bytes), offsets, end


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
