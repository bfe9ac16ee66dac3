"""Turns values into a block format and back, as ggml's reference does (ggml-quants.c), bit for bit.

A block holds 32 elements. Q8_0: a float16 scale, then 32 int8. Q4_0: a float16 scale, then 32 nibbles, each 8
too high. Q4_1: a float16 scale and minimum, then 32 nibbles. Byte i of the nibbles holds element i in its low
half and element i + 16 in its high half.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jinn.weights.block_formats import BlockFormat

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


def dequantize(data: ByteArray, block_format: BlockFormat, shape: Sequence[int]) -> FloatArray:
    """The values, float32 of `shape`, of a tensor's bytes [nbytes]. Raises ValueError on a wrong size."""
    if data.dtype != np.uint8 or data.size != block_format.nbytes(shape):
        raise ValueError(
            f"{block_format.name} {list(shape)} takes {block_format.nbytes(shape)} bytes, not {data.nbytes}"
        )
    blocks = np.ascontiguousarray(data).reshape(-1, block_format.block_bytes)
    return _DEQUANTIZE[block_format.name](blocks).reshape(tuple(shape))


def quantize(values: npt.NDArray[np.floating], block_format: BlockFormat) -> ByteArray:
    """The bytes, uint8 [nbytes], of `values` [..., row] taken as float32.

    Raises ValueError where a row is not a whole number of blocks, or the format cannot hold a value or scale.
    """
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(values, np.float32)
    block_format.nbytes(values.shape)
    if not np.isfinite(values).all():
        raise ValueError(f"only finite values can be stored as {block_format.name}")
    blocks = values.reshape(-1, block_format.block_elems)
    return _QUANTIZE[block_format.name](blocks).reshape(-1)


def _float16_bytes(values: FloatArray) -> ByteArray:
    """float32 [n, 1] to float16, as bytes [n, 2]."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise ValueError("a value or block scale is too large for float16")
    return halves.view(np.uint8)


def _float16_column(blocks: ByteArray, offset: int) -> FloatArray:
    """The float16 at byte `offset` of each block, float32 [num_blocks, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _dequantize_f32(blocks: ByteArray) -> FloatArray:
    return blocks.view("<f4").astype(np.float32)


def _dequantize_f16(blocks: ByteArray) -> FloatArray:
    return blocks.view("<f2").astype(np.float32)


def _dequantize_bf16(blocks: ByteArray) -> FloatArray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _dequantize_q8_0(blocks: ByteArray) -> FloatArray:
    scale = _float16_column(blocks, 0)
    return np.multiply(scale, blocks[:, 2:].view(np.int8), dtype=np.float32)


def _dequantize_q4_0(blocks: ByteArray) -> FloatArray:
    values = _nibbles(blocks[:, 2:])
    values -= 8
    values *= _float16_column(blocks, 0)
    return values


def _dequantize_q4_1(blocks: ByteArray) -> FloatArray:
    values = _nibbles(blocks[:, 4:])
    values *= _float16_column(blocks, 0)
    values += _float16_column(blocks, 2)
    return values


def _nibbles(packed: ByteArray) -> FloatArray:
    """Bytes [n, 16] to their nibbles as float32 [n, 32]."""
    values = np.empty((len(packed), 32), np.float32)
    values[:, :16] = packed & 0x0F
    values[:, 16:] = packed >> 4
    return values


def _pack_nibbles(codes: ByteArray) -> ByteArray:
    return codes[:, :16] | (codes[:, 16:] << np.uint8(4))


def _inverse(scale: FloatArray) -> FloatArray:
    """1 / scale; 0 where the scale is 0 or so small that float16 makes it 0 and its inverse overflows."""
    is_normal = np.abs(scale) >= np.finfo(np.float32).tiny
    return np.divide(1, scale, out=np.zeros_like(scale), where=is_normal)


def _quantize_f32(blocks: FloatArray) -> ByteArray:
    return blocks.astype("<f4").view(np.uint8)


def _quantize_bf16(blocks: FloatArray) -> ByteArray:
    """Rounds to nearest, ties to even."""
    bits = blocks.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    if ((rounded & 0x7F80) == 0x7F80).any():
        raise ValueError("a value is too large for BF16")
    return rounded.astype("<u2").view(np.uint8)


def _quantize_q8_0(blocks: FloatArray) -> ByteArray:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    codes = _round_half_away(blocks * _inverse(scale)).astype(np.int8).view(np.uint8)
    return np.concatenate([_float16_bytes(scale), codes], axis=1)


def _round_half_away(values: FloatArray) -> FloatArray:
    """C's roundf: halves away from zero."""
    magnitude = np.abs(values)
    whole = np.floor(magnitude)
    rounded: FloatArray = np.copysign(whole + np.floor(2 * (magnitude - whole)), values)
    return rounded


def _quantize_q4_0(blocks: FloatArray) -> ByteArray:
    """The element of the largest magnitude, with its sign, becomes code 0: -8."""
    largest: FloatArray = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-8)
    codes = np.minimum(np.trunc(blocks * _inverse(scale) + np.float32(8.5)), 15).astype(np.uint8)
    return np.concatenate([_float16_bytes(scale), _pack_nibbles(codes)], axis=1)


def _quantize_q4_1(blocks: FloatArray) -> ByteArray:
    minimum = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - minimum) / 15
    codes = np.minimum(np.trunc((blocks - minimum) * _inverse(scale) + np.float32(0.5)), 15).astype(np.uint8)
    return np.concatenate([_float16_bytes(scale), _float16_bytes(minimum), _pack_nibbles(codes)], axis=1)


_DEQUANTIZE = {
    "F32": _dequantize_f32,
    "F16": _dequantize_f16,
    "BF16": _dequantize_bf16,
    "Q8_0": _dequantize_q8_0,
    "Q4_0": _dequantize_q4_0,
    "Q4_1": _dequantize_q4_1,
}
_QUANTIZE = {
    "F32": _quantize_f32,
    "F16": _float16_bytes,
    "BF16": _quantize_bf16,
    "Q8_0": _quantize_q8_0,
    "Q4_0": _quantize_q4_0,
    "Q4_1": _quantize_q4_1,
}
