"""Turns values into a block format and back, as ggml's reference does (ggml-quants.c): bit for bit, but for
the K formats, whose scales have no closed form.

A block holds 32 elements. Q8_0: a float16 scale, then 32 int8. Q4_0: a float16 scale, then 32 nibbles, each 8
too high. Q4_1: a float16 scale and minimum, then 32 nibbles. Byte i of the nibbles holds element i in its low
half and element i + 16 in its high half. Q5_0 and Q5_1 have 32 more bits before the nibbles, each element's
fifth. IQ4_NL is Q4_0 with a codebook.

The K formats and IQ4_XS have blocks of 256: 8 or 16 sub-blocks with small integer scales, and float16 factors
for these. Elements 32 or 64 (nibbles) or 32 (bits and pairs of bits) apart share a byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jinn.weights.block_fields import (
    ByteArray,
    FloatArray,
    float16_bytes,
    float16_column,
    inverse,
    pack_codes,
    unpack_codes,
)
from jinn.weights.block_formats import BlockFormat
from jinn.weights.k_quantize import quantize_q4_k, quantize_q6_k

_CHUNK_BLOCKS = 1 << 14  # bounds the memory that quantising takes beside its result


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

    Raises ValueError where a row is not a whole number of blocks, the format cannot hold a value or scale, or
    nothing here quantises to it (`QUANTIZABLE` names what can be had).
    """
    if block_format.name not in QUANTIZABLE:
        raise ValueError(f"values cannot be quantised to {block_format.name}, only {', '.join(QUANTIZABLE)}")
    data = np.empty(block_format.nbytes(values.shape), np.uint8).reshape(-1, block_format.block_bytes)
    blocks = values.reshape(-1, block_format.block_elems)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        with np.errstate(over="ignore"):
            chunk = np.ascontiguousarray(blocks[start : start + _CHUNK_BLOCKS], np.float32)
        if not np.isfinite(chunk).all():
            raise ValueError(f"only finite values can be stored as {block_format.name}")
        data[start : start + _CHUNK_BLOCKS] = _QUANTIZE[block_format.name](chunk)
    return data.reshape(-1)


def _dequantize_f32(blocks: ByteArray) -> FloatArray:
    return blocks.view("<f4").astype(np.float32)


def _dequantize_f16(blocks: ByteArray) -> FloatArray:
    return blocks.view("<f2").astype(np.float32)


def _dequantize_bf16(blocks: ByteArray) -> FloatArray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _dequantize_q8_0(blocks: ByteArray) -> FloatArray:
    scale = float16_column(blocks, 0)
    return np.multiply(scale, blocks[:, 2:].view(np.int8), dtype=np.float32)


def _dequantize_q4_0(blocks: ByteArray) -> FloatArray:
    return _scaled(unpack_codes(blocks[:, 2:], 4, 16), -8, float16_column(blocks, 0))


def _dequantize_q4_1(blocks: ByteArray) -> FloatArray:
    codes = unpack_codes(blocks[:, 4:], 4, 16)
    return _scaled(codes, 0, float16_column(blocks, 0)) + float16_column(blocks, 2)


def _dequantize_q5_0(blocks: ByteArray) -> FloatArray:
    return _scaled(_five_bits(blocks[:, 2:]), -16, float16_column(blocks, 0))


def _dequantize_q5_1(blocks: ByteArray) -> FloatArray:
    return _scaled(_five_bits(blocks[:, 4:]), 0, float16_column(blocks, 0)) + float16_column(blocks, 2)


def _dequantize_q2_k(blocks: ByteArray) -> FloatArray:
    scales, minimums = blocks[:, :16] & np.uint8(0x0F), blocks[:, :16] >> np.uint8(4)
    values = _scaled(unpack_codes(blocks[:, 16:80], 2, 32), 0, float16_column(blocks, 80) * scales)
    return _less(values, float16_column(blocks, 82) * minimums)


def _dequantize_q3_k(blocks: ByteArray) -> FloatArray:
    codes = unpack_codes(blocks[:, 32:96], 2, 32) | unpack_codes(blocks[:, :32], 1, 32) << np.uint8(2)
    packed = blocks[:, 96:108]
    scales = unpack_codes(packed[:, :8], 4, 8) | unpack_codes(packed[:, 8:], 2, 4) << np.uint8(4)
    return _scaled(codes, -4, float16_column(blocks, 108) * (scales.astype(np.float32) - 32))


def _dequantize_q4_k(blocks: ByteArray) -> FloatArray:
    return _dequantize_with_minimums(blocks, unpack_codes(blocks[:, 16:], 4, 32))


def _dequantize_q5_k(blocks: ByteArray) -> FloatArray:
    codes = unpack_codes(blocks[:, 48:], 4, 32) | unpack_codes(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return _dequantize_with_minimums(blocks, codes)


def _dequantize_with_minimums(blocks: ByteArray, codes: ByteArray) -> FloatArray:
    """Q4_K and Q5_K: 8 scales and 8 minimums of 6 bits each in 12 bytes."""
    scales, minimums, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([scales & 0x3F, rest & 0x0F | scales >> 2 & 0x30], axis=1)
    minimums = np.concatenate([minimums & 0x3F, rest >> 4 | minimums >> 2 & 0x30], axis=1)
    values = _scaled(codes, 0, float16_column(blocks, 0) * scales)
    return _less(values, float16_column(blocks, 2) * minimums)


def _dequantize_q6_k(blocks: ByteArray) -> FloatArray:
    codes = unpack_codes(blocks[:, :128], 4, 64) | unpack_codes(blocks[:, 128:192], 2, 32) << np.uint8(4)
    return _scaled(codes, -32, float16_column(blocks, 208) * blocks[:, 192:208].view(np.int8))


def _dequantize_iq4_nl(blocks: ByteArray) -> FloatArray:
    values = _IQ4_CODEBOOK[unpack_codes(blocks[:, 2:], 4, 16)]
    values *= float16_column(blocks, 0)
    return values


def _dequantize_iq4_xs(blocks: ByteArray) -> FloatArray:
    highs = unpack_codes(blocks[:, 2:4], 2, 1)
    scales = (unpack_codes(blocks[:, 4:8], 4, 1) | highs << np.uint8(4)).astype(np.float32) - 32
    values = _IQ4_CODEBOOK[unpack_codes(blocks[:, 8:], 4, 16)]
    values.reshape(len(blocks), 8, 32)[:] *= (float16_column(blocks, 0) * scales)[:, :, None]
    return values


_IQ4_CODEBOOK = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


def _five_bits(packed: ByteArray) -> ByteArray:
    """Fifth bits and nibbles, bytes [n, 4 + 16], as codes [n, 32]."""
    return unpack_codes(packed[:, 4:], 4, 16) | unpack_codes(packed[:, :4], 1, 1) << np.uint8(4)


def _scaled(codes: ByteArray, offset: int, scales: FloatArray) -> FloatArray:
    """scale * (code + offset), each scale [n, s] for as many codes."""
    values = codes.astype(np.float32)
    values += offset
    runs = values.reshape(*scales.shape, -1)
    runs *= scales[:, :, None]
    return values


def _less(values: FloatArray, minimums: FloatArray) -> FloatArray:
    """values less a minimum [n, s] for as many of them."""
    runs = values.reshape(*minimums.shape, -1)
    runs -= minimums[:, :, None]
    return values


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
    codes = _round_half_away(blocks * inverse(scale)).astype(np.int8).view(np.uint8)
    return np.concatenate([float16_bytes(scale), codes], axis=1)


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
    codes = np.minimum(np.trunc(blocks * inverse(scale) + np.float32(8.5)), 15).astype(np.uint8)
    return np.concatenate([float16_bytes(scale), pack_codes(codes, 4, 16)], axis=1)


def _quantize_q4_1(blocks: FloatArray) -> ByteArray:
    minimum = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - minimum) / 15
    codes = np.minimum(np.trunc((blocks - minimum) * inverse(scale) + np.float32(0.5)), 15).astype(np.uint8)
    return np.concatenate([float16_bytes(scale), float16_bytes(minimum), pack_codes(codes, 4, 16)], axis=1)


def _quantize_q5_0(blocks: FloatArray) -> ByteArray:
    """As Q4_0, with 5 bits: the largest magnitude becomes -16."""
    largest: FloatArray = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-16)
    codes = np.minimum(np.trunc(blocks * inverse(scale) + np.float32(16.5)), 31).astype(np.uint8)
    return np.concatenate([float16_bytes(scale), *_pack_five_bits(codes)], axis=1)


def _quantize_q5_1(blocks: FloatArray) -> ByteArray:
    minimum = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - minimum) / 31
    codes = np.minimum(np.trunc((blocks - minimum) * inverse(scale) + np.float32(0.5)), 31).astype(np.uint8)
    return np.concatenate([float16_bytes(scale), float16_bytes(minimum), *_pack_five_bits(codes)], axis=1)


def _pack_five_bits(codes: ByteArray) -> tuple[ByteArray, ByteArray]:
    """Codes [n, 32] as fifth bits [n, 4] and nibbles [n, 16]."""
    return np.packbits(codes >> np.uint8(4), axis=1, bitorder="little"), pack_codes(
        codes & np.uint8(0x0F), 4, 16
    )


_DEQUANTIZE = {
    "F32": _dequantize_f32,
    "F16": _dequantize_f16,
    "BF16": _dequantize_bf16,
    "Q8_0": _dequantize_q8_0,
    "Q4_0": _dequantize_q4_0,
    "Q4_1": _dequantize_q4_1,
    "Q5_0": _dequantize_q5_0,
    "Q5_1": _dequantize_q5_1,
    "Q2_K": _dequantize_q2_k,
    "Q3_K": _dequantize_q3_k,
    "Q4_K": _dequantize_q4_k,
    "Q5_K": _dequantize_q5_k,
    "Q6_K": _dequantize_q6_k,
    "IQ4_NL": _dequantize_iq4_nl,
    "IQ4_XS": _dequantize_iq4_xs,
}
_QUANTIZE = {
    "F32": _quantize_f32,
    "F16": float16_bytes,
    "BF16": _quantize_bf16,
    "Q8_0": _quantize_q8_0,
    "Q4_0": _quantize_q4_0,
    "Q4_1": _quantize_q4_1,
    "Q5_0": _quantize_q5_0,
    "Q5_1": _quantize_q5_1,
    "Q4_K": quantize_q4_k,
    "Q6_K": quantize_q6_k,
}
QUANTIZABLE = tuple(_QUANTIZE)
