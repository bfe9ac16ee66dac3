"""Reads GGUF version 2 and 3, little-endian, taking nothing that the file says on trust.

Every count, length, offset and type is compared with the file's size before it is used. The format is
described in ggml's docs/gguf.md; where that leaves room the stricter reading is taken: strings are UTF-8 (a
vocabulary with replaced bytes would merge tokens silently), booleans 0 or 1, names unique, arrays not nested.
"""

from __future__ import annotations

from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from jinn.weights.block_formats import FORMAT_BY_GGML_ID, FORMATS, GGML_TYPE_NAMES, BlockFormat
from jinn.weights.errors import WeightsError, quoted
from jinn.weights.mapped_file import MappedFile
from jinn.weights.tensors import TensorInfo, check_layout

MetadataValue = str | int | float | bool | list[str] | npt.NDArray[Any]

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MIN_ALIGNMENT = 8
MAX_ALIGNMENT = 1 << 16
MAX_DIMS = 4
MAX_HEADER_BYTES = 128 << 20  # a vocabulary of 262,144 with its merges takes under 20 MiB
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 17

_WINDOW_BYTES = 4 << 20
_MIN_KEY_BYTES = 8 + 4 + 1  # the key's length, the type, the smallest value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # the name's length, n_dims, one dimension, the type, the offset

_U32 = Struct("<I")
_U64 = Struct("<Q")

_U32_TYPE, _BOOL_TYPE, _STRING_TYPE, _ARRAY_TYPE = 4, 7, 8, 9
_NUMBER_DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


class GGUFFile:
    """An open GGUF file: `metadata` by key, `tensors` by name, and their bytes.

    A metadata value is a str, int, float or bool; an array of strings is a list, any other a numpy array.
    Raises WeightsError, one line that names the file, the field or tensor, and the byte.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = MappedFile(self.path)
        try:
            self.metadata, self.tensors = _parse(self._file)
        except BaseException:
            self._file.close()
            raise

    @property
    def files(self) -> list[Path]:
        """The one file, as `Shards` has several."""
        return [self.path]

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes [nbytes], a read-only view of the map. Raises KeyError for an unknown name."""
        tensor = self.tensors[name]
        return self._file.view(tensor.offset, tensor.nbytes)

    def mapping(self) -> npt.NDArray[np.uint8]:
        """The whole file [file size] as a read-only view; `TensorInfo.offset` counts from its start."""
        return self._file.view()

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory; reading them again is allowed."""
        tensor = self.tensors[name]
        self._file.release(tensor.offset, tensor.nbytes)

    def close(self) -> None:
        """Close the file; views that were handed out stay valid."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Cursor:
    """Walks the header. `what` names the field being read, for errors."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._window = file.read(0, min(file.size, _WINDOW_BYTES))
        self.offset = 0

    def error(self, message: str, offset: int | None = None) -> WeightsError:
        return WeightsError(f"{self._file.path}: byte {self.offset if offset is None else offset}: {message}")

    def _window_to(self, end: int, what: str) -> bytes:
        """The file from its start to `end` or beyond; `end` must lie inside file and header limit."""
        if end > self._file.size:
            needed = end - self.offset
            raise self.error(f"{what} needs {needed} bytes, past the end of the file at {self._file.size}")
        if end > MAX_HEADER_BYTES:
            raise self.error(f"{what} makes the header longer than {MAX_HEADER_BYTES} bytes")
        if end > len(self._window):
            target = min(max(end, 2 * len(self._window)), self._file.size)
            self._window += self._file.read(len(self._window), target - len(self._window))
        return self._window

    def unpack(self, layout: Struct, what: str) -> tuple[int, ...]:
        window = self._window_to(self.offset + layout.size, what)
        values = layout.unpack_from(window, self.offset)
        self.offset += layout.size
        return values

    def numbers(self, dtype: np.dtype[Any], count: int, what: str) -> npt.NDArray[Any]:
        """`count` numbers, copied."""
        end = self.offset + count * dtype.itemsize
        window = self._window_to(end, what)
        values = np.frombuffer(window, dtype, count, self.offset).copy()
        self.offset = end
        return values

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. Vocabularies make this the longest part of opening a file: hence the bare loop."""
        window = self._window_to(self.offset + 8 * count, what)
        limit, length_at = len(window), _U64.unpack_from
        offset = self.offset
        texts: list[str] = []
        try:
            for _ in range(count):
                start = offset + 8
                if start > limit:
                    self.offset = offset
                    window = self._window_to(start, what)
                    limit = len(window)
                end = start + length_at(window, offset)[0]
                if end > limit:
                    self.offset = offset
                    window = self._window_to(end, what)
                    limit = len(window)
                texts.append(window[start:end].decode())
                offset = end
        except UnicodeDecodeError:
            raise self.error(f"string {len(texts)} of {what} is not valid UTF-8", offset) from None
        self.offset = offset
        return texts

    def check_count(self, count: int, min_bytes: int, limit: int, what: str) -> None:
        """Raise where `count` items of `min_bytes` or more exceed `limit` or the rest of the file."""
        limit = min(limit, (self._file.size - self.offset) // min_bytes)
        if count > limit:
            raise self.error(f"{what} is {count}, but at most {limit} are possible")


def _parse(file: MappedFile) -> tuple[dict[str, MetadataValue], dict[str, TensorInfo]]:
    cursor = _Cursor(file)
    _check_version(cursor)
    (tensor_count,) = cursor.unpack(_U64, "the number of tensors")
    (key_count,) = cursor.unpack(_U64, "the number of metadata keys")
    cursor.check_count(tensor_count, _MIN_TENSOR_BYTES, MAX_TENSORS, "the number of tensors")
    cursor.check_count(key_count, _MIN_KEY_BYTES, MAX_KEYS, "the number of metadata keys")
    metadata = _read_metadata(cursor, key_count)
    alignment = _alignment(cursor, metadata)
    tensors = _read_tensors(cursor, tensor_count, alignment)
    check_layout(file.path, tensors.values(), file.size)
    return metadata, tensors


def _check_version(cursor: _Cursor) -> None:
    (magic,) = cursor.unpack(_U32, "the magic")
    if _U32.pack(magic) != MAGIC:
        raise cursor.error(f"not a GGUF file: it begins with {_U32.pack(magic)!r}, not {MAGIC!r}", 0)
    (version,) = cursor.unpack(_U32, "the version")
    if version not in SUPPORTED_VERSIONS:
        found = f"version {version}" if version & 0xFFFF else "big-endian GGUF"
        raise cursor.error(f"{found} is not supported; little-endian versions 2 and 3 are", 4)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(count):
        start = cursor.offset
        key = cursor.string(f"the name of metadata key {index}")
        what = f"metadata key {quoted(key)}"
        if key in metadata:
            raise cursor.error(f"{what} appears twice", start)
        (type_id,) = cursor.unpack(_U32, what)
        if key == "general.alignment" and type_id != _U32_TYPE:
            raise cursor.error(f"{what} has type {type_id}, not {_U32_TYPE} (uint32)", start)
        metadata[key] = _read_value(cursor, type_id, what)
    return metadata


def _read_value(cursor: _Cursor, type_id: int, what: str) -> MetadataValue:
    if type_id == _ARRAY_TYPE:
        return _read_array(cursor, what)
    if type_id == _STRING_TYPE:
        return cursor.string(what)
    value: int | float | bool = _read_numbers(cursor, type_id, 1, what)[0].item()
    return value


def _read_array(cursor: _Cursor, what: str) -> MetadataValue:
    (type_id,) = cursor.unpack(_U32, what)
    if type_id == _ARRAY_TYPE:
        raise cursor.error(f"{what} is an array of arrays, which is not supported")
    (count,) = cursor.unpack(_U64, what)
    if type_id == _STRING_TYPE:
        return cursor.strings(count, what)
    return _read_numbers(cursor, type_id, count, what)


def _read_numbers(cursor: _Cursor, type_id: int, count: int, what: str) -> npt.NDArray[Any]:
    dtype = _NUMBER_DTYPES.get(type_id)
    if dtype is None:
        raise cursor.error(f"{what} has the unknown value type {type_id}")
    start = cursor.offset
    values = cursor.numbers(dtype, count, what)
    if type_id != _BOOL_TYPE:
        return values
    if (values > 1).any():
        raise cursor.error(f"{what} holds a boolean other than 0 and 1", start)
    return values.view(np.bool_)


def _alignment(cursor: _Cursor, metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        isinstance(alignment, int)
        and MIN_ALIGNMENT <= alignment <= MAX_ALIGNMENT
        and alignment.bit_count() == 1
    ):
        return alignment
    allowed = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
    raise cursor.error(f"metadata key 'general.alignment' is {alignment}, not {allowed}")


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    listed: dict[str, tuple[BlockFormat, tuple[int, ...], int, int]] = {}
    for index in range(count):
        start = cursor.offset
        name = cursor.string(f"the name of tensor {index}")
        if name in listed:
            raise cursor.error(f"tensor {quoted(name)} is listed twice", start)
        listed[name] = _read_tensor_entry(cursor, f"tensor {quoted(name)}", alignment)
    data_start = -(-cursor.offset // alignment) * alignment
    return {
        name: TensorInfo(name, block_format, shape, data_start + offset, nbytes)
        for name, (block_format, shape, offset, nbytes) in listed.items()
    }


def _read_tensor_entry(
    cursor: _Cursor, what: str, alignment: int
) -> tuple[BlockFormat, tuple[int, ...], int, int]:
    """Format, shape, offset from the start of the data, and size in bytes."""
    start = cursor.offset
    (num_dims,) = cursor.unpack(_U32, what)
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"{what} has {num_dims} dimensions, not 1 to {MAX_DIMS}", start)
    shape = cursor.unpack(Struct(f"<{num_dims}Q"), what)[::-1]
    if 0 in shape:
        raise cursor.error(f"{what} {list(shape)} has a dimension of 0", start)
    (type_id,) = cursor.unpack(_U32, what)
    (offset,) = cursor.unpack(_U64, what)
    if offset % alignment:
        raise cursor.error(f"{what} has offset {offset}, not a multiple of {alignment}", start)
    block_format = FORMAT_BY_GGML_ID.get(type_id)
    if block_format is None:
        type_name = GGML_TYPE_NAMES.get(type_id, "unknown")
        supported = ", ".join(known.name for known in FORMATS)
        raise cursor.error(f"{what} has type {type_name} ({type_id}); supported are {supported}", start)
    try:
        nbytes = block_format.nbytes(shape)
    except ValueError as error:
        raise cursor.error(f"{what} {list(shape)}: {error}", start) from None
    return block_format, shape, offset, nbytes
