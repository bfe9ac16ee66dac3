from __future__ import annotations

import time

import numpy as np
import pytest

from jinn.weights import finite_check
from jinn.weights.block_formats import BF16, F16, F32, FORMATS
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.finite_check import check_finite
from jinn.weights.hub import resolve_model
from jinn.weights.quantize import QUANTIZABLE, quantize
from jinn.weights.tensors import TensorInfo

SHAPE = (4, 512)
BAD_BITS = {
    F32: [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001],
    F16: [0x7C00, 0xFC00, 0x7E00, 0x7C01],
    BF16: [0x7F80, 0xFF80, 0x7FC0, 0x7F81],
}
BY_NAME = pytest.mark.parametrize("block_format", FORMATS, ids=lambda block_format: block_format.name)


def tensor(block_format):
    return TensorInfo("blk.0.weight", block_format, SHAPE, 0, block_format.nbytes(SHAPE))


def good_data(block_format):
    """Values up to the largest that are finite; codes of 0xFF where nothing quantises to the format."""
    if block_format.name not in QUANTIZABLE:
        blocks = np.full(
            (block_format.nbytes(SHAPE) // block_format.block_bytes, block_format.block_bytes), 0xFF, np.uint8
        )
        for offset in block_format.scale_offsets:
            blocks[:, offset : offset + 2] = [0xFF, 0x7B]
        return blocks.reshape(-1)
    values = np.random.default_rng(0).standard_normal(SHAPE)
    values[0, 0] = 65000
    return quantize(values, block_format)


@BY_NAME
@pytest.mark.parametrize("chunk", [1, 3, 1 << 18])
def test_nan_and_infinity_are_found_wherever_they_are(block_format, chunk, monkeypatch):
    monkeypatch.setattr(finite_check, "_CHUNK_BLOCKS", chunk)
    check_finite(tensor(block_format), good_data(block_format))
    num_blocks = len(good_data(block_format)) // block_format.block_bytes
    kind = F16 if block_format.is_quantized else block_format
    for bits in BAD_BITS[kind]:
        for block in (0, 1, num_blocks - 1):
            for offset in block_format.scale_offsets or (0,):
                data = good_data(block_format)
                start = block * block_format.block_bytes + offset
                data[start : start + kind.block_bytes] = list(bits.to_bytes(kind.block_bytes, "little"))
                element = block * block_format.block_elems
                with pytest.raises(WeightsError, match=f"'blk.0.weight': the .* at element {element} is NaN"):
                    check_finite(tensor(block_format), data)


@BY_NAME
def test_read_only_and_unaligned_bytes(block_format):
    data = good_data(block_format)
    shifted = np.zeros(len(data) + 1, np.uint8)[1:]
    shifted[:] = data
    shifted.flags.writeable = False
    check_finite(tensor(block_format), shifted)


def test_codes_are_not_taken_for_scales():
    """Bytes of 0xFF are NaN as a float16, and fine as a quantised block's codes."""
    for block_format in FORMATS:
        if block_format.is_quantized:
            data = np.full((8, block_format.block_bytes), 0xFF, np.uint8)
            for offset in block_format.scale_offsets:
                data[:, offset : offset + 2] = 0
            check_finite(tensor(block_format), data.reshape(-1))


def test_the_packaged_model_is_finite_and_checked_fast():
    with open_checkpoint(resolve_model(None)) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.check_finite(name)
        start = time.process_time()
        for name in checkpoint.tensors:
            checkpoint.check_finite(name)
        assert time.process_time() - start < 0.15  # measured: 0.02
