"""The fields of quantised blocks: codes of a few bits in bytes, and float16 scales."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


def unpack_codes(packed: ByteArray, bits: int, run: int) -> ByteArray:
    """The codes of `bits` bits in bytes [n, m], uint8 [n, m * 8 / bits].

    `run` bytes hold 8 / bits times as many codes: first their lowest bits' codes, then the next.
    """
    codes: ByteArray = packed.reshape(len(packed), -1, 1, run) >> _shifts(bits) & np.uint8((1 << bits) - 1)
    return codes.reshape(len(packed), -1)


def pack_codes(codes: ByteArray, bits: int, run: int) -> ByteArray:
    """The inverse of `unpack_codes`; higher bits of a code must be 0."""
    shifted = codes.reshape(len(codes), -1, 8 // bits, run) << _shifts(bits)
    packed: ByteArray = np.bitwise_or.reduce(shifted, axis=2)
    return packed.reshape(len(codes), -1)


def _shifts(bits: int) -> ByteArray:
    return np.arange(0, 8, bits, dtype=np.uint8)[:, None]


def float16_bytes(values: FloatArray) -> ByteArray:
    """float32 [n, 1] to float16, as bytes [n, 2]. Raises ValueError where one becomes infinite."""
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise ValueError("a value or block scale is too large for float16")
    return halves.view(np.uint8)


def float16_column(blocks: ByteArray, offset: int) -> FloatArray:
    """The float16 at byte `offset` of each block, float32 [num_blocks, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def inverse(scale: FloatArray) -> FloatArray:
    """1 / scale; 0 where the scale is 0 or so small that float16 makes it 0 and its inverse overflows."""
    is_normal = np.abs(scale) >= np.finfo(np.float32).tiny
    return np.divide(1, scale, out=np.zeros_like(scale), where=is_normal)
