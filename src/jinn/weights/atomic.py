"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinn.weights.errors import WeightsError


@contextmanager
def atomic_output(path: Path, num_bytes: int, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a path beside `path` to write a file or folder at; renamed at the end, deleted on an error.

    Raises WeightsError where `path` exists and may not be overwritten, and where the disk lacks room for
    `num_bytes`.
    """
    check_absent(path, overwrite=overwrite)
    parent = path.absolute().parent
    if not parent.is_dir():
        raise WeightsError(f"{parent}: no such folder")
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise WeightsError(f"{path}: needs {num_bytes:,} bytes, but {parent} has {free:,} free")
    part = parent / f".{path.name}.{os.getpid()}.part"
    try:
        yield part
        _replace(part, path)
    finally:
        _delete(part)


def check_absent(path: Path, *, overwrite: bool) -> None:
    """Raise WeightsError where there is a file or folder that may not be overwritten."""
    if path.exists() and not overwrite:
        raise WeightsError(f"{path}: exists already; --force overwrites it")


def _replace(part: Path, path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        part.replace(path)
        return
    # a folder cannot be replaced in one step
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(old)
    part.rename(path)
    shutil.rmtree(old)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
