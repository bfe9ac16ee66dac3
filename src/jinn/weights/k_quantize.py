"""Quantises to Q4_K and Q6_K: sub-blocks' scales are searched for the least weighted error.

The search is that of ggml-quants.c (make_qkx2_quants, make_qx_quants): try steps a little finer and coarser
than the values' range asks for, round, solve for the scale that fits the codes best, keep the best of all.
"""

from __future__ import annotations

import numpy as np

from jinn.weights.block_fields import (
    ByteArray,
    FloatArray,
    float16_bytes,
    float16_column,
    inverse,
    pack_codes,
)

_MIN_MAGNITUDE = 1e-15
_MAX_MAGNITUDE = 2.0**31  # no float16 can scale codes so far, and squares stay finite
_MIN_DETERMINANT = 1e-5
_FLOAT16_STEP = np.float32(2.0**-24)  # between those below its normal numbers
_FEW_STEPS = 64  # of a scale: the nearest to fewer may be off by so much that it tells


def quantize_q4_k(blocks: FloatArray) -> ByteArray:
    """float32 [n, 256] to bytes [n, 144]: 8 sub-blocks, each value scale * code - minimum, codes 0 to 15."""
    x = _bounded(blocks).reshape(-1, 32)
    scales, minimums = (found.reshape(-1, 8) for found in _fit_scale_and_minimum(x, 15))
    scale_codes, scale = _quantize_scales(scales)
    minimum_codes, minimum = _quantize_scales(minimums)
    steps = (float16_column(scale, 0) * scale_codes).reshape(-1, 1)
    offsets = (float16_column(minimum, 0) * minimum_codes).reshape(-1, 1)
    codes = np.clip(np.rint((x + offsets) * inverse(steps)), 0, 15).astype(np.uint8)
    packed = pack_codes(codes.reshape(len(blocks), 256), 4, 32)
    return np.concatenate([scale, minimum, _pack_six_bits(scale_codes, minimum_codes), packed], axis=1)


def quantize_q6_k(blocks: FloatArray) -> ByteArray:
    """float32 [n, 256] to bytes [n, 210]: 16 sub-blocks, each value scale * code, codes -32 to 31."""
    x = _bounded(blocks).reshape(-1, 16)
    scales = _fit_scale(x, 32).reshape(-1, 16)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1, keepdims=True), axis=1)
    to_code = np.float32(-128) * inverse(largest)
    scale, to_code = _as_float16(inverse(to_code), to_code)
    scale_codes = np.minimum(np.rint(to_code * scales), 127).astype(np.int8)
    steps = (float16_column(scale, 0) * scale_codes).reshape(-1, 1)
    codes = (np.clip(np.rint(x * inverse(steps)), -32, 31) + 32).astype(np.uint8).reshape(len(blocks), 256)
    low, high = pack_codes(codes & np.uint8(0x0F), 4, 64), pack_codes(codes >> np.uint8(4), 2, 32)
    return np.concatenate([low, high, scale_codes.view(np.uint8), scale], axis=1)


def _bounded(values: FloatArray) -> FloatArray:
    """The values, 0 for those so small that the smallest float16 scale is beyond them."""
    magnitudes = np.abs(values)
    if magnitudes.max(initial=0) > _MAX_MAGNITUDE:
        raise ValueError("a value or block scale is too large for float16")
    return np.where(magnitudes < _MIN_MAGNITUDE, np.float32(0), values)


def _fit_scale_and_minimum(x: FloatArray, num_steps: int) -> tuple[FloatArray, FloatArray]:
    """For each row of x [n, m]: scale and minimum >= 0 so that x is close to scale * code - minimum.

    Errors are weighted by the magnitude of x plus its root mean square.
    """
    weights = np.abs(x)
    weights += np.sqrt(np.einsum("ij,ij->i", x, x) / x.shape[1])[:, None]
    sum_w, sum_x = weights.sum(axis=1), np.einsum("ij,ij->i", weights, x)
    low = np.minimum(x.min(axis=1), 0)
    spread = x.max(axis=1) - low
    above = x - low[:, None]
    best_scale, best_minimum = spread / num_steps, low
    best = np.full(len(x), np.inf, np.float32)
    for finer in range(-10, 11):
        codes = above * (np.float32(num_steps + 0.1 * finer) * inverse(spread))[:, None]
        np.clip(np.rint(codes, out=codes), 0, num_steps, out=codes)
        weighted = weights * codes
        sum_l, sum_l2 = weighted.sum(axis=1), np.einsum("ij,ij->i", weighted, codes)
        sum_xl = np.einsum("ij,ij->i", weighted, x)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        per_determinant = inverse(determinant)
        scale = (sum_w * sum_xl - sum_x * sum_l) * per_determinant
        minimum = (sum_l2 * sum_x - sum_l * sum_xl) * per_determinant
        is_above = minimum > 0
        scale = np.where(is_above, sum_xl * inverse(sum_l2), scale)
        minimum = np.where(is_above, np.float32(0), minimum)
        # the weighted square of scale * code + minimum - x, less that of x
        error = scale * (scale * sum_l2 + 2 * (minimum * sum_l - sum_xl))
        error += minimum * (minimum * sum_w - 2 * sum_x)
        # where all codes are the same the determinant is 0 but for rounding
        is_better = (determinant > _MIN_DETERMINANT * sum_w * sum_l2) & (error < best)
        best = np.where(is_better, error, best)
        best_scale = np.where(is_better, scale, best_scale)
        best_minimum = np.where(is_better, minimum, best_minimum)
    return best_scale, -best_minimum


def _fit_scale(x: FloatArray, num_steps: int) -> FloatArray:
    """For each row of x [n, m]: the scale so that x is close to scale * code, weighted by x squared."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    weights = x * x
    weighted_x = weights * x
    per_largest = inverse(largest)
    best_scale = np.zeros(len(x), np.float32)
    best = np.full(len(x), -np.inf, np.float32)
    for finer in range(-9, 10):
        codes = x * (np.float32(-(num_steps + 0.1 * finer)) * per_largest)
        np.clip(np.rint(codes, out=codes), -num_steps, num_steps - 1, out=codes)
        sum_lx = np.einsum("ij,ij->i", weighted_x, codes)
        codes *= codes
        sum_l2 = np.einsum("ij,ij->i", weights, codes)
        scale = sum_lx * inverse(sum_l2)
        is_better = scale * sum_lx > best
        best = np.where(is_better, scale * sum_lx, best)
        best_scale = np.where(is_better, scale, best_scale)
    return best_scale


def _quantize_scales(scales: FloatArray) -> tuple[ByteArray, ByteArray]:
    """Scales >= 0 [n, 8] as codes of 6 bits [n, 8], and the float16 that they multiply, as bytes [n, 2]."""
    largest = scales.max(axis=1, keepdims=True)
    scale, to_code = _as_float16(largest / 63, 63 * inverse(largest))
    return np.clip(np.rint(scales * to_code), 0, 63).astype(np.uint8), scale


def _as_float16(scale: FloatArray, to_code: FloatArray) -> tuple[ByteArray, FloatArray]:
    """A block's scale [n, 1] as bytes, and the factor that turns its sub-blocks' scales into codes.

    Of a few of float16's smallest steps the nearest may be far off, or 0: there it is the next larger, and
    codes fit that.
    """
    is_tiny = np.abs(scale) < _FEW_STEPS * _FLOAT16_STEP
    steps = np.ceil(np.abs(scale) / _FLOAT16_STEP) * _FLOAT16_STEP
    held = float16_bytes(np.where(is_tiny, np.copysign(steps, scale), scale))
    return held, np.where(is_tiny, inverse(float16_column(held, 0)), to_code)


def _pack_six_bits(scales: ByteArray, minimums: ByteArray) -> ByteArray:
    """Two times 8 codes in 12 bytes: the first four of each whole, with the others' high bits above them."""
    four = np.uint8(4)
    return np.concatenate(
        [
            scales[:, :4] | scales[:, 4:] >> four << np.uint8(6),
            minimums[:, :4] | minimums[:, 4:] >> four << np.uint8(6),
            scales[:, 4:] & np.uint8(0x0F) | minimums[:, 4:] << four,
        ],
        axis=1,
    )
