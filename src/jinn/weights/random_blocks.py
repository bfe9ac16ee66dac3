"""Random tensors written as blocks, with no values in between: as fast as random bytes."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import numpy.typing as npt

from jinn.weights.block_formats import BlockFormat
from jinn.weights.quantize import quantize

ByteArray = npt.NDArray[np.uint8]
Blocks = Callable[[np.random.Generator, int, float], ByteArray]

_INT8_STD = sqrt((255**2 - 1) / 12)  # of all codes equally often
_FOUR_BIT_STD = sqrt((16**2 - 1) / 12)
_SIX_BIT_STD = sqrt((64**2 - 1) / 12)
_SUB_SCALE = 63


def random_blocks(
    rng: np.random.Generator, block_format: BlockFormat, num_blocks: int, std: float
) -> ByteArray:
    """Bytes [num_blocks * block_bytes] of values with mean 0 and this standard deviation.

    Raises ValueError for a format that has no such rule.
    """
    if block_format.name in _BLOCKS:
        return _BLOCKS[block_format.name](rng, num_blocks, std).reshape(-1)
    if block_format.is_quantized:
        raise ValueError(f"there is no rule for random blocks of {block_format.name}")
    values = rng.standard_normal(num_blocks, np.float32)
    values *= std
    return quantize(values, block_format)


def _bytes(rng: np.random.Generator, num_blocks: int, block_bytes: int) -> ByteArray:
    words = rng.integers(0, 1 << 64, -(-num_blocks * block_bytes // 8), np.uint64)
    return words.view(np.uint8)[: num_blocks * block_bytes].reshape(num_blocks, block_bytes)


def _set_scales(blocks: ByteArray, offset: int, scales: npt.NDArray[np.float32] | float) -> None:
    """Write float16 scales at a byte of each block."""
    halves = np.broadcast_to(np.asarray(scales, np.float16), len(blocks))
    blocks[:, offset : offset + 2] = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 2)


def _signed(rng: np.random.Generator, num_blocks: int, scale: float) -> npt.NDArray[np.float32]:
    """The scale with a random sign: codes that lean to one side then lean to none."""
    return np.where(rng.integers(0, 2, num_blocks, np.uint8) > 0, np.float32(scale), np.float32(-scale))


def _q8_0(rng: np.random.Generator, num_blocks: int, std: float) -> ByteArray:
    blocks = _bytes(rng, num_blocks, 34)
    codes = blocks[:, 2:].view(np.int8)
    np.maximum(codes, -127, out=codes)
    _set_scales(blocks, 0, std / _INT8_STD)
    return blocks


def _q4_0(rng: np.random.Generator, num_blocks: int, std: float) -> ByteArray:
    blocks = _bytes(rng, num_blocks, 18)
    _set_scales(blocks, 0, _signed(rng, num_blocks, std / _FOUR_BIT_STD))
    return blocks


def _q4_1(rng: np.random.Generator, num_blocks: int, std: float) -> ByteArray:
    blocks = _bytes(rng, num_blocks, 20)
    scale = float(np.float16(std / _FOUR_BIT_STD))
    _set_scales(blocks, 0, scale)
    _set_scales(blocks, 2, -7.5 * scale)
    return blocks


def _q4_k(rng: np.random.Generator, num_blocks: int, std: float) -> ByteArray:
    """Every sub-block has the largest scale and minimum, so that all 12 bytes of them are ones."""
    blocks = _bytes(rng, num_blocks, 144)
    scale = float(np.float16(std / _FOUR_BIT_STD / _SUB_SCALE))
    _set_scales(blocks, 0, scale)
    _set_scales(blocks, 2, 7.5 * scale)
    blocks[:, 4:16] = 0xFF
    return blocks


def _q6_k(rng: np.random.Generator, num_blocks: int, std: float) -> ByteArray:
    blocks = _bytes(rng, num_blocks, 210)
    blocks[:, 192:208] = _SUB_SCALE
    _set_scales(blocks, 208, _signed(rng, num_blocks, std / _SIX_BIT_STD / _SUB_SCALE))
    return blocks


_BLOCKS: dict[str, Blocks] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k, "Q6_K": _q6_k}
