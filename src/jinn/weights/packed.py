"""Packed weights kept in a file, so that a start packs nothing and kernels read through a map what they need.

A checkpoint's weights are packed once. The file has them at page boundaries, behind a header in JSON: its
key, and its tensors' places and checksums. It is written beside, and renamed once it is whole and on disk, so
that a file that is there is whole. Processes that start together wait for the one that writes. It makes room
for that of the model's next version.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from jinn import env
from jinn.weights.errors import WeightsError
from jinn.weights.model_folder import plain_name

PAGE = 4096
_KEY_LENGTH = 32
_DIGEST_LENGTH = 64
_READ_BYTES = 2**22


def packed_folder() -> Path:
    """Where packed experts are kept unless another place is asked for."""
    return env.home() / "packed"


def packed_path(folder: Path, model: Path, tensors: Iterable[str]) -> Path:
    """The file in `folder` that keeps these packed tensors of the model at a path."""
    return folder / f"{plain_name(str(model.resolve()))}-{packed_key(*tensors)[:8]}.packed"


def packed_files(folder: Path, model: Path) -> list[Path]:
    """All files in `folder` that keep something of the model at a path."""
    return list(folder.glob(f"{plain_name(str(model.resolve()))}-*.packed"))


class PackedFile:
    """The packed weights of one checkpoint, of known sizes, at `path`. A context manager.

    A file there with another `key` or other sizes is of another version of the model, and goes. Until
    `is_whole`, each tensor's bytes are to be written to its place and sealed; then `finish` makes the file
    known. Raises WeightsError where it cannot be written or has no room.
    """

    def __init__(self, path: Path, key: str, sizes: Mapping[str, int]) -> None:
        self._key, self._sizes = key, sizes
        self._offsets, self._size = _layout(key, sizes)
        self._digests: dict[str, str] = {}  # SHA-256, by tensor
        self._final, folder = path, path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise WeightsError(f"{folder}: packed weights cannot be kept here: {error.strerror}") from None
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.is_whole = self._is_there()
        self.path = path if self.is_whole else path.with_suffix(".part")

    def __enter__(self) -> Self:
        try:
            if not self.is_whole:
                self._reserve()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def offset(self, name: str) -> int:
        """Where a tensor's bytes begin."""
        return self._offsets[name]

    def seal(self, name: str) -> None:
        """Note the checksum of what was written for a tensor."""
        self._digests[name] = self._digest(name)

    def verify(self) -> None:
        """Raise WeightsError, naming the tensor, where what a whole file holds is not what was sealed."""
        for name, digest in self._digests.items():
            if self._digest(name) != digest:
                raise WeightsError(f"{self.path}: tensor {name!r} is not as it was packed; delete the file")

    def finish(self) -> None:
        """Put what was written on disk, and the file in its place."""
        if self.is_whole:
            return
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())
            file.write(self._header())
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
        """Whether the file has this header; its checksums are taken from there."""
        try:
            with self._final.open("rb") as file:
                header = file.read(self._header_bytes)
                size = os.fstat(file.fileno()).st_size
            _, tensors = json.loads(header)
            self._digests = {name: digest for name, (_, _, digest) in tensors.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return False
        return size == self._size and self._digests.keys() == self._sizes.keys() and header == self._header()

    @property
    def _header_bytes(self) -> int:
        return next(iter(self._offsets.values()), 0)

    def _header(self) -> bytes:
        return _header(self._key, self._offsets, self._sizes, self._digests).ljust(self._header_bytes)

    def _digest(self, name: str) -> str:
        digest, left = hashlib.sha256(), self._sizes[name]
        with self.path.open("rb") as file:
            file.seek(self._offsets[name])
            while left and (data := file.read(min(left, _READ_BYTES))):
                digest.update(data)
                left -= len(data)
        return digest.hexdigest()

    def _reserve(self) -> None:
        """Room on disk for all of it, before hours may go by."""
        try:
            self._final.unlink(missing_ok=True)
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            disk = os.statvfs(self.path.parent)
            raise WeightsError(
                f"{self.path.parent}: no room for {self._size} bytes of packed weights, "
                f"{disk.f_bavail * disk.f_frsize} are free: {error.strerror}"
            ) from None


def packed_key(*parts: object) -> str:
    """A name for what a packed file was made of."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_KEY_LENGTH]


def _layout(key: str, sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Each tensor's offset behind the header, and the size of it all."""
    longest = _header(key, dict.fromkeys(sizes, 2**62), sizes, dict.fromkeys(sizes, "0" * _DIGEST_LENGTH))
    offsets, end = {}, _pages(len(longest))
    for name, nbytes in sizes.items():
        offsets[name] = end
        end += _pages(nbytes)
    return offsets, end


def _header(
    key: str, offsets: Mapping[str, int], sizes: Mapping[str, int], digests: Mapping[str, str]
) -> bytes:
    return json.dumps([key, {name: [offsets[name], sizes[name], digests[name]] for name in sizes}]).encode()


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
