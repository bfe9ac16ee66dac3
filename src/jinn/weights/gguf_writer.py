"""Writes GGUF version 3, little-endian, a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from struct import pack
from typing import Any, BinaryIO

import numpy as np

from jinn.weights.gguf import DEFAULT_ALIGNMENT, MAGIC, MetadataValue
from jinn.weights.output import OutputTensor, Progress, total_progress

_VERSION = 3
_BOOL, _STRING, _ARRAY = 7, 8, 9
_INTEGERS = ((4, "<I", 0, 1 << 32), (5, "<i", -(1 << 31), 1 << 31), (10, "<Q", 0, 1 << 64))
_FLOAT32, _INT64 = 6, 11
_ARRAY_TYPES = {
    "u1": 0,
    "i1": 1,
    "u2": 2,
    "i2": 3,
    "u4": 4,
    "i4": 5,
    "f4": 6,
    "b1": 7,
    "u8": 10,
    "i8": 11,
    "f8": 12,
}


def write_gguf(
    path: Path, metadata: Mapping[str, MetadataValue], tensors: Sequence[OutputTensor], progress: Progress
) -> None:
    """Write a new file. An integer is stored as uint32 where it fits, a float as float32, an array as it is.

    Raises ValueError where a tensor's chunks are not of its size.
    """
    count = total_progress(tensors, progress)
    with path.open("xb") as file:
        file.write(_header(metadata, tensors))
        _pad(file)
        for tensor in tensors:
            tensor.write(file, count)
            _pad(file)


def _header(metadata: Mapping[str, MetadataValue], tensors: Sequence[OutputTensor]) -> bytes:
    parts = [MAGIC, pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += (_string(key), _value(value))
    offset = 0
    for tensor in tensors:
        dims = (tensor.shape or (1,))[::-1]
        parts += (_string(tensor.name), pack(f"<I{len(dims)}Q", len(dims), *dims))
        parts.append(pack("<IQ", tensor.format.ggml_id, offset))
        offset += -(-tensor.nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    return b"".join(parts)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value with its type."""
    if isinstance(value, bool):
        return pack("<IB", _BOOL, value)
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, float):
        return pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        type_id = _ARRAY_TYPES[value.dtype.str[1:]]
        return (
            pack("<IIQ", _ARRAY, type_id, value.size) + value.astype(value.dtype.newbyteorder("<")).tobytes()
        )
    return pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))


def _integer(value: int) -> bytes:
    for type_id, layout, low, high in _INTEGERS:
        if low <= value < high:
            return pack("<I", type_id) + pack(layout, value)
    return pack("<Iq", _INT64, value)
