"""What the cache keeps: numbers rounded as its type says, in blocks that can be copied."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jinn import _native
from jinn.ops.protocol import KVSpec
from jinn.ops.reference import PagedCache, tensor_batch

from .compare import assert_same_bits
from .programs import ISAS, one_sequence, packed_sequences
from .test_attention import Shape, native_cache, program, random_qkv

BY_ISA = pytest.mark.parametrize("isa", ISAS)
BY_DTYPE = pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])


@BY_ISA
@BY_DTYPE
@pytest.mark.parametrize("value_dim", [4, 20, 64, 100])
def test_values_come_back_rounded_as_in_the_reference(isa, dtype, value_dim):
    """Attention over a single position is that position's value."""
    shape = Shape(3, 1, 8, value_dim, 16)
    q, k, v = (x.copy() for x in random_qkv(shape, 33))
    v[4] = 0
    v[5] *= 1e-6
    v[6] *= 1e6
    batch = packed_sequences([([row], 1) for row in range(33)])
    attend = program(shape, (q, k, v), isa=isa)
    (y,) = attend.run(batch, native_cache(shape, dtype, 33))
    reference = PagedCache([shape.spec], dtype, 33, 16)
    tensors = tensor_batch(batch)
    expected = []
    for s in range(33):
        keys, values = (torch.from_numpy(x[s : s + 1]).reshape(1, 3, -1) for x in (k, v))
        reference.store(0, tensors, s, keys, values)
        expected.append(reference.load(0, tensors, s)[1].reshape(1, -1))
    assert np.array_equal(y, torch.cat(expected).numpy())  # but for the sign of a zero


@BY_DTYPE
def test_a_copied_block_reads_the_same(dtype):
    shape = Shape(2, 2, 20, 12, 16)
    qkv = random_qkv(shape, 41)
    attend = program(shape, qkv)
    blocks = native_cache(shape, dtype, 8)
    attend.run(one_sequence(range(40)), blocks)
    step = one_sequence([40], 41)
    (expected,) = attend.run(step, blocks)
    for source, target in [(0, 7), (1, 3), (2, 6)]:
        blocks.copy_block(source, target)
        blocks.fill_block(source, 0xFF)
    (y,) = attend.run(replace(step, block_tables=np.array([[7, 3, 6]], np.int32)), blocks)
    assert_same_bits(y, expected)


def test_a_block_takes_no_more_than_its_numbers():
    numbers = 32 * (3 * 64 + 3 * 64)
    layers = [(3, 64, 64)] * 30
    for dtype, expected in (("f32", 4 * numbers), ("bf16", 2 * numbers), ("int8", numbers + 32 * 3 * 2 * 4)):
        assert _native.KVCache(layers, dtype, 1, 32).block_bytes == 30 * expected


def test_what_a_cache_cannot_be_is_refused():
    for dtype, num_blocks, block_size in [("f32", 0, 16), ("f32", 1, 8), ("f32", 1, 24)]:
        with pytest.raises(ValueError, match="block_size a multiple of 16"):
            _native.KVCache([(1, 4, 4)], dtype, num_blocks, block_size)
    with pytest.raises(ValueError, match="fp8 is not one of f32, bf16, int8"):
        _native.KVCache([(1, 4, 4)], "fp8", 1, 16)
    with pytest.raises(ValueError, match="multiple of 4"):
        _native.KVCache([(1, 6, 4)], "bf16", 1, 16)


@pytest.mark.parametrize(("source", "target"), [(-1, 0), (0, 2), (2, 0)])
def test_a_block_that_is_not_there_is_refused(source, target):
    blocks = _native.KVCache([(1, 4, 4)], "f32", 2, 16)
    with pytest.raises(ValueError, match="no such block"):
        blocks.copy_block(source, target)


def test_a_slot_holds_one_position_of_the_reference():
    """Positions go to the block that the table names, and stay apart from other sequences'."""
    spec = KVSpec(1, 4, 4)
    blocks = PagedCache([spec], "f32", 4, 2)
    batch = tensor_batch(replace(one_sequence([0, 1, 2]), block_tables=np.array([[3, 1]], np.int32)))
    numbers = torch.arange(12.0).reshape(3, 1, 4)
    blocks.store(0, batch, 0, numbers, -numbers)
    keys, values = blocks.load(0, batch, 0)
    assert torch.equal(keys, numbers)
    assert torch.equal(values, -numbers)
    blocks.copy_block(3, 0)
    moved = tensor_batch(replace(one_sequence([0, 1, 2]), block_tables=np.array([[0, 1]], np.int32)))
    assert torch.equal(blocks.load(0, moved, 0)[0], numbers)
