from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jinn.weights.block_formats import F16, F32, FORMAT_BY_NAME, FORMATS, Q2_K, Q4_1, Q4_K, Q6_K, Q8_0
from jinn.weights.quantize import QUANTIZABLE, dequantize, quantize

BY_NAME = pytest.mark.parametrize("block_format", FORMATS, ids=lambda block_format: block_format.name)
K_FORMATS = (Q4_K, Q6_K)
BY_SIMPLE = pytest.mark.parametrize(
    "block_format",
    [FORMAT_BY_NAME[name] for name in QUANTIZABLE if FORMAT_BY_NAME[name] not in K_FORMATS],
    ids=lambda block_format: block_format.name,
)
BY_QUANTIZABLE = pytest.mark.parametrize(
    "block_format", [FORMAT_BY_NAME[name] for name in QUANTIZABLE], ids=QUANTIZABLE
)


def random_blocks(block_format, num_blocks, seed=0):
    """Every bit pattern but those of NaN and infinity, float16 subnormals among the scales."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_blocks, block_format.block_bytes), np.uint8)
    if block_format.is_quantized:
        for offset in block_format.scale_offsets:
            scales = rng.integers(0, 1 << 16, num_blocks).astype(np.uint16)
            scales[::4] &= 0x83FF  # subnormals and zeros of both signs
            scales[(scales & 0x7C00) == 0x7C00] ^= 0x4000
            blocks[:, offset : offset + 2] = scales.reshape(-1, 1).view(np.uint8)
        return blocks.reshape(-1)
    dtype = np.dtype(f"<u{block_format.block_bytes}")
    exponent = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[block_format.name]
    values = blocks.view(dtype)
    values[(values & exponent) == exponent] = 1
    return values.view(np.uint8).reshape(-1)


@BY_NAME
def test_dequantize_equals_the_gguf_package_bit_for_bit(block_format):
    num_blocks = 1 << 12
    data = random_blocks(block_format, num_blocks)
    shape = (64, num_blocks // 64 * block_format.block_elems)
    values = dequantize(data, block_format, shape)
    assert values.dtype == np.float32
    assert values.shape == shape
    expected = gguf.quants.dequantize(data.reshape(64, -1), gguf.GGMLQuantizationType[block_format.name])
    assert np.array_equal(values.view(np.uint32), expected.view(np.uint32))


def test_every_float16_scale_of_q4_1():
    """All 63,488 finite scales, against arithmetic in Python's floats, rounded once."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7C00) != 0x7C00]
    blocks = np.zeros((len(bits), 20), np.uint8)
    blocks[:, :2] = bits.reshape(-1, 1).view(np.uint8)
    blocks[:, 4] = 0xF1
    values = dequantize(blocks.reshape(-1), Q4_1, (len(bits), 32))
    scale = bits.view(np.float16).astype(np.float64)
    assert np.array_equal(values[:, 0], scale)
    assert np.array_equal(values[:, 16], 15 * scale)


@BY_SIMPLE
def test_quantize_equals_the_gguf_package(block_format):
    rng = np.random.default_rng(1)
    magnitudes = rng.choice([1e-6, 1e-3, 1, 100], (256, 1))
    values = (rng.standard_normal((256, 96)) * magnitudes).astype(np.float32)
    values[3] = 0
    values[4] = 0.5
    values[5] = -np.arange(96)
    values[6, :32] = np.linspace(-127, 127, 32)
    data = quantize(values, block_format)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[block_format.name])
    assert data.dtype == np.uint8
    assert data.shape == (block_format.nbytes(values.shape),)
    assert bytes(data) == expected.tobytes()


@BY_QUANTIZABLE
def test_a_round_trip_is_close(block_format):
    values = np.random.default_rng(2).standard_normal((8, 512)).astype(np.float32)
    again = dequantize(quantize(values, block_format), block_format, values.shape)
    bits = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q4_K": 4, "Q6_K": 6}
    float_steps = {"F32": 0, "F16": 2e-3, "BF16": 2e-2}
    name = block_format.name
    step = float_steps[name] if name in float_steps else 6.4 / 2 ** bits[name]
    assert np.abs(again - values).max() <= step
    assert (step == 0) == np.array_equal(again, values)


@BY_NAME
def test_strided_and_read_only_bytes(block_format):
    data = random_blocks(block_format, 8)
    shape = (2, 4 * block_format.block_elems)
    strided = np.repeat(data, 2)[::2]
    strided.flags.writeable = False
    assert np.array_equal(dequantize(strided, block_format, shape), dequantize(data, block_format, shape))


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="takes 34 bytes, not 33"):
        dequantize(np.zeros(33, np.uint8), Q8_0, (1, 32))
    with pytest.raises(ValueError, match="takes 34 bytes"):
        dequantize(np.zeros(34, np.int8), Q8_0, (1, 32))
    with pytest.raises(ValueError, match="33 elements is not a multiple of Q8_0's 32"):
        quantize(np.zeros((1, 33)), Q8_0)


@BY_QUANTIZABLE
def test_values_that_a_format_cannot_hold_are_refused(block_format):
    for value in (np.nan, np.inf, 1e300):
        with pytest.raises(ValueError, match="finite"):
            quantize(np.full((1, 256), value), block_format)
    if block_format is not F32:
        with pytest.raises(ValueError, match="too large"):
            quantize(np.full((1, 256), 3.4e38 if "_1" in block_format.name else -3.4e38), block_format)


@pytest.mark.parametrize("name", [name for name in QUANTIZABLE if FORMAT_BY_NAME[name].is_quantized])
def test_a_block_too_small_for_float16_becomes_zero(name):
    block_format = FORMAT_BY_NAME[name]
    values = np.linspace(-1e-40, 1e-40, 256, dtype=np.float32).reshape(1, 256)
    assert not dequantize(quantize(values, block_format), block_format, (1, 256)).any()


def test_a_format_without_a_quantizer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"cannot be quantised to Q2_K, only F32, .*Q8_0"):
        quantize(np.zeros((1, 256)), Q2_K)


def test_a_scalar_is_one_element():
    assert dequantize(np.array([0, 60], np.uint8), F16, ()) == np.float32(1)


# of ggml's own quantisers (libggml 0.26) on the values of the test below
GGML_ERRORS = {
    "Q4_K": {
        "normal": 0.071419,
        "laplace": 0.084557,
        "heavy tails": 0.093192,
        "uniform": 0.054587,
        "positive": 0.029142,
    },
    "Q6_K": {
        "normal": 0.01769,
        "laplace": 0.021645,
        "heavy tails": 0.025739,
        "uniform": 0.013217,
        "positive": 0.013126,
    },
}
DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, size=shape),
    "uniform": lambda rng, shape: rng.random(shape) - 0.5,
    "positive": lambda rng, shape: rng.random(shape),
}


def relative_error(values, block_format):
    again = dequantize(quantize(values, block_format), block_format, values.shape)
    return np.linalg.norm(again - values) / np.linalg.norm(values)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("block_format", K_FORMATS, ids=lambda block_format: block_format.name)
def test_k_formats_lose_no_more_than_in_ggml(block_format, distribution):
    values = DISTRIBUTIONS[distribution](np.random.default_rng(3), (256, 512)).astype(np.float32)
    assert relative_error(values, block_format) <= 1.02 * GGML_ERRORS[block_format.name][distribution]


@pytest.mark.parametrize("block_format", K_FORMATS, ids=lambda block_format: block_format.name)
def test_k_formats_keep_what_they_can_hold(block_format):
    """Sub-blocks of zeros, of one value, and of codes times a power of two; one large value among small."""
    values = np.zeros((4, 256), np.float32)
    values[1] = 0.5
    values[2] = np.tile(np.arange(16), 16) * 0.25
    values[3, 7] = 1e4
    again = dequantize(quantize(values, block_format), block_format, values.shape)
    assert not again[0].any()
    assert np.abs(again[1] - 0.5).max() <= 1e-3
    assert np.abs(again[2] - values[2]).max() <= (0.02 if block_format is Q4_K else 0.06)
    assert abs(again[3, 7] / 1e4 - 1) <= 1e-3
    assert not again[3, 32:].any()


@BY_QUANTIZABLE
def test_rows_are_independent_across_chunks(block_format, monkeypatch):
    values = np.random.default_rng(4).standard_normal((12, 256)).astype(np.float32)
    whole = quantize(values, block_format)
    monkeypatch.setattr("jinn.weights.quantize._CHUNK_BLOCKS", 5)
    assert bytes(quantize(values, block_format)) == bytes(whole)
    assert bytes(np.concatenate([quantize(row, block_format) for row in values])) == bytes(whole)


BLOCKS = hnp.arrays(np.float32, (2, 256), elements=st.floats(-1e4, 1e4, width=32))
# of the largest magnitude in a block: half a step, and what rounding the scales to 6 or 8 bits adds
ERROR_BOUNDS = {"F32": 0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 5e-3, "Q4_0": 0.13, "Q4_1": 0.07, "Q5_0": 0.07}
ERROR_BOUNDS |= {"Q5_1": 0.035, "Q4_K": 0.25, "Q6_K": 0.07}


@BY_QUANTIZABLE
@given(values=BLOCKS)
@example(values=np.full((2, 256), 2.0**-14, np.float32))
@example(values=np.full((2, 256), 2.5e-5, np.float32))
@settings(max_examples=100, deadline=None)
def test_errors_are_bounded_by_the_block(block_format, values):
    again = dequantize(quantize(values, block_format), block_format, values.shape)
    largest = np.abs(values).max(axis=1, keepdims=True)
    float16_step = 6e-8 * 128  # below its normal numbers scales have fewer bits
    assert (np.abs(again - values) <= ERROR_BOUNDS[block_format.name] * largest + float16_step).all()
