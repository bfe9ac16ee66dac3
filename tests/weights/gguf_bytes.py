"""A GGUF file as a list of fields, so that tests can lie about any one of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"}
_CODES |= {U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string whose length field may lie."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def scalar(type_id: int, value) -> bytes:
    """A value with its type."""
    return struct.pack("<I", type_id) + (
        text(value) if type_id == STRING else struct.pack("<" + _CODES[type_id], value)
    )


def array(type_id: int, values, count: int | None = None) -> bytes:
    """An array with its types, whose count field may lie."""
    items = b"".join(scalar(type_id, value)[4:] for value in values)
    return struct.pack("<IIQ", ARRAY, type_id, len(values) if count is None else count) + items


@dataclass
class Tensor:
    """A tensor's entry; dims are in GGUF's order, the row's length first."""

    name: str = "weight"
    dims: tuple[int, ...] = (32, 2)
    type_id: int = 0
    offset: int = 0
    num_dims: int | None = None
    name_length: int | None = None

    def encode(self) -> bytes:
        num_dims = len(self.dims) if self.num_dims is None else self.num_dims
        shape = struct.pack(f"<I{len(self.dims)}Q", num_dims, *self.dims)
        return text(self.name, self.name_length) + shape + struct.pack("<IQ", self.type_id, self.offset)


@dataclass
class GGUF:
    """A small valid file unless a field says otherwise."""

    magic: bytes = b"GGUF"
    version: int = 3
    metadata: list[tuple[str, bytes]] = field(
        default_factory=lambda: [("general.architecture", scalar(STRING, "llama"))]
    )
    tensors: list[Tensor] = field(default_factory=lambda: [Tensor()])
    data: bytes = bytes(256)
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32

    def header(self) -> bytes:
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        key_count = len(self.metadata) if self.key_count is None else self.key_count
        counts = struct.pack("<IQQ", self.version, tensor_count, key_count)
        keys = b"".join(text(key) + value for key, value in self.metadata)
        return self.magic + counts + keys + b"".join(tensor.encode() for tensor in self.tensors)

    def encode(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data
