"""Packed weights: the values are the file's own, and take no more room."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from jinn import _native
from jinn.engine.loading import _is_mapped
from jinn.weights.block_formats import FORMAT_BY_NAME
from jinn.weights.mapped_file import MappedFile
from jinn.weights.quantize import quantize

from .programs import FORMATS, POOLS, pack, parameter, run_op, whole_blocks

BY_FORMAT = pytest.mark.parametrize("name", FORMATS)


def random_bytes(name: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """A tensor's bytes with every pattern of codes; scales of all finite float16 values, subnormals too."""
    rng = np.random.default_rng(seed)
    block_format = FORMAT_BY_NAME[name]
    if not block_format.is_quantized:
        values = rng.standard_normal((rows, cols)) * rng.choice([1e-6, 1, 1e4], (rows, 1))
        return quantize(values, block_format)
    blocks = rng.integers(
        0, 256, (rows * cols // block_format.block_elems, block_format.block_bytes), np.uint8
    )
    for offset in block_format.scale_offsets:
        scales = rng.integers(0, 1 << 16, len(blocks)).astype(np.uint16)
        scales[::4] &= 0x83FF
        scales[(scales & 0x7C00) == 0x7C00] ^= 0x4000
        blocks[:, offset : offset + 2] = scales.reshape(-1, 1).view(np.uint8)
    return blocks.reshape(-1)


def gguf_values(name: str, data: np.ndarray, rows: int, cols: int) -> np.ndarray:
    values = gguf.quants.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType[name])
    return values.reshape(rows, cols)


@BY_FORMAT
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 65])
def test_values_are_exactly_those_of_the_gguf_package(name, rows):
    cols = 3 * FORMAT_BY_NAME[name].block_elems if FORMAT_BY_NAME[name].is_quantized else 37
    data = random_bytes(name, rows, cols)
    packed = _native.pack(POOLS[2], data, name, rows, cols)
    assert packed.shape == (rows, cols)
    assert packed.format == name
    expected = gguf_values(name, data, rows, cols)
    assert np.array_equal(packed.dequantize().view(np.uint32), expected.view(np.uint32))


@BY_FORMAT
def test_row_order_takes_rows_from_where_it_says(name):
    rows, cols = 50, whole_blocks(name, 64)
    data = random_bytes(name, rows, cols, seed=1)
    order = np.random.default_rng(2).permutation(rows).astype(np.int32)
    packed = _native.pack(POOLS[2], data, name, rows, cols, order)
    assert np.array_equal(packed.dequantize(), gguf_values(name, data, rows, cols)[order])


@BY_FORMAT
@pytest.mark.parametrize("rows", [1, 40])
def test_embed_reads_exactly_these_values(name, rows):
    cols = whole_blocks(name, 64)
    data = random_bytes(name, rows, cols, seed=3)
    table = _native.pack(POOLS[1], data, name, rows, cols)

    def build(ops, _):
        return [ops.embed(parameter(table), None)]

    (values,) = run_op(build, np.zeros((rows, 1), np.float32))
    assert np.array_equal(values, gguf_values(name, data, rows, cols))


@BY_FORMAT
@pytest.mark.parametrize(
    ("rows", "cols"), [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576), (151936, 64)]
)
def test_a_pack_takes_at_most_two_percent_more_than_the_file(name, rows, cols):
    cols = whole_blocks(name, cols)
    nbytes = FORMAT_BY_NAME[name].nbytes((rows, cols))
    packed = _native.pack(POOLS[2], np.zeros(nbytes, np.uint8), name, rows, cols)
    assert nbytes <= packed.nbytes <= 1.02 * nbytes


def test_an_unknown_format_is_refused_by_name():
    with pytest.raises(ValueError, match=r"IQ9_X is not supported; supported are .*Q4_1"):
        _native.pack(POOLS[1], np.zeros(64, np.uint8), "IQ9_X", 1, 64)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="not rows"):
        _native.pack(POOLS[1], np.zeros(33, np.uint8), "Q8_0", 1, 32)
    with pytest.raises(ValueError, match="not whole blocks of Q8_0"):
        _native.pack(POOLS[1], np.zeros(34, np.uint8), "Q8_0", 1, 33)
    with pytest.raises(ValueError, match="not whole blocks of Q4_K"):
        _native.pack(POOLS[1], np.zeros(144, np.uint8), "Q4_K", 1, 128)
    with pytest.raises(ValueError, match="out of range"):
        pack(np.ones((2, 2)), "F32", np.array([0, 2], np.int32))
    with pytest.raises(ValueError, match="one source row per row"):
        pack(np.ones((2, 2)), "F32", np.array([0], np.int32))


def mapped_kilobytes() -> int:
    """Of files, in this process's memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssFile:")[2].split()[0])


@pytest.mark.parametrize("num_experts", [0, 8])
def test_pages_of_a_mapped_file_go_while_they_are_packed(tmp_path, num_experts):
    rows, cols, name = 16384, 2048, "Q8_0"
    data = np.tile(random_bytes(name, 64, cols), rows // 64)
    (tmp_path / "file").write_bytes(data)
    mapped = MappedFile(tmp_path / "file")
    source = mapped.view()
    assert _is_mapped(source)
    assert not _is_mapped(data)
    source.max()
    before = mapped_kilobytes()
    if num_experts:
        parts = list(source.reshape(num_experts, -1))
        packed = _native.pack_experts(POOLS[2], parts, name, rows // num_experts, cols, is_mapped=True)
        values = packed.dequantize()[-1, -1]
    else:
        values = _native.pack(POOLS[2], source, name, rows, cols, is_mapped=True).dequantize()[-1]
    assert before - mapped_kilobytes() > 0.9 * data.nbytes / 1024
    assert np.array_equal(values, gguf_values(name, data[-(cols // 32 * 34) :], 1, cols)[0])
    assert np.array_equal(source, data)
    mapped.close()
