"""Paged attention against the reference: every cache type, around the edges of blocks and partitions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from jinn import _native
from jinn.ops.protocol import Context, KVSpec
from jinn.ops.reference import PagedCache, ReferenceOps, tensor_batch

from .compare import TOLERANCE, assert_close, assert_same_bits
from .programs import ISAS, OpProgram, one_sequence, packed_sequences

BY_ISA = pytest.mark.parametrize("isa", ISAS)
DTYPES = ("f32", "bf16", "int8")
BY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
CONTEXTS = (1, 15, 16, 17, 255, 256, 257, 513)


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int
    group: int  # query heads per key/value head
    key_dim: int
    value_dim: int
    block_size: int

    @property
    def spec(self):
        return KVSpec(self.num_kv_heads, self.key_dim, self.value_dim)

    @property
    def scale(self):
        return self.key_dim**-0.5


SHAPES = (
    Shape(1, 1, 4, 4, 16),
    Shape(2, 3, 16, 16, 32),
    Shape(1, 4, 20, 20, 16),
    Shape(3, 3, 64, 64, 32),
    Shape(2, 5, 80, 80, 32),
    Shape(1, 4, 128, 128, 16),
    Shape(2, 1, 24, 12, 16),
    Shape(1, 5, 8, 100, 32),
    Shape(1, 33, 24, 16, 16),
)
BY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_kv_heads}x{s.group}x{s.key_dim}")


@cache
def random_qkv(shape, num_tokens):
    rng = np.random.default_rng(num_tokens)
    num_heads = shape.num_kv_heads * shape.group
    widths = (
        num_heads * shape.key_dim,
        shape.num_kv_heads * shape.key_dim,
        shape.num_kv_heads * shape.value_dim,
    )
    return [2 * rng.standard_normal((num_tokens, width), np.float32) for width in widths]


def program(shape, qkv, **settings):
    def build(ops, q, k, v):
        return [ops.attention(q, k, v, Context(), shape.spec, shape.scale)]

    return OpProgram(build, *qkv, **settings)


def native_cache(shape, dtype, num_blocks, fill=0xFF):
    """Every byte is `fill` at first: 0xff is NaN in every type."""
    layer = (shape.num_kv_heads, shape.key_dim, shape.value_dim)
    blocks = _native.KVCache([layer], dtype, num_blocks, shape.block_size)
    for block in range(num_blocks):
        blocks.fill_block(block, fill)
    return blocks


def all_contexts(shape):
    """One batch with a whole prompt of each length."""
    ends = np.cumsum(CONTEXTS)
    rows = [range(end - length, end) for end, length in zip(ends, CONTEXTS, strict=True)]
    return packed_sequences([(r, len(r)) for r in rows], shape.block_size)


@cache
def expected_of_all_contexts(shape, dtype):
    batch = all_contexts(shape)
    blocks = PagedCache([shape.spec], dtype, batch.block_tables.size, shape.block_size)
    q, k, v = map(torch.from_numpy, random_qkv(shape, sum(CONTEXTS)))
    context = Context(tensor_batch(batch), blocks)
    return ReferenceOps().attention(q, k, v, context, shape.spec, shape.scale).numpy()


def tolerance(isa, dtype):
    """AMX multiplies 16 bits of each weight of the softmax, and the cache's numbers have 8."""
    return 1.5 * TOLERANCE if (isa, dtype) == ("amx", "bf16") else TOLERANCE


@BY_ISA
@BY_DTYPE
@BY_SHAPE
def test_values(isa, dtype, shape):
    """Nothing of the NaN in unused places of the cache comes through."""
    batch = all_contexts(shape)
    attend = program(shape, random_qkv(shape, sum(CONTEXTS)), isa=isa)
    (y,) = attend.run(batch, native_cache(shape, dtype, batch.block_tables.size))
    assert_close(y, expected_of_all_contexts(shape, dtype), tolerance(isa, dtype))


WIDE = (Shape(1, 20, 576, 512, 16), Shape(2, 8, 256, 256, 32))  # DeepSeek-V3's absorbed, Qwen3-Next's


@BY_ISA
@BY_DTYPE
@pytest.mark.parametrize("shape", WIDE, ids=["576", "256"])
def test_wide_heads(isa, dtype, shape):
    """And many that share a key: token by token, with two threads, the bits of the whole."""
    lengths, num_tokens = (1, 17, 70), 88
    ends = np.cumsum(lengths)
    rows = [range(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    batch = packed_sequences([(r, len(r)) for r in rows], shape.block_size)
    qkv = random_qkv(shape, num_tokens)
    (y,) = program(shape, qkv, isa=isa).run(batch, native_cache(shape, dtype, batch.block_tables.size))
    blocks = PagedCache([shape.spec], dtype, batch.block_tables.size, shape.block_size)
    context = Context(tensor_batch(batch), blocks)
    expected = ReferenceOps().attention(*map(torch.from_numpy, qkv), context, shape.spec, shape.scale)
    assert_close(y, expected.numpy())
    attend, blocks = program(shape, qkv, isa=isa, num_threads=2), native_cache(shape, dtype, 5)
    for length, row in enumerate(rows[-1], start=1):
        (token,) = attend.run(one_sequence([row], length, shape.block_size), blocks)
        assert_same_bits(token[0], y[row])


@BY_ISA
@BY_DTYPE
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[4]], ids=["20", "80"])
def test_chunks_and_neighbours_leave_the_bits(isa, dtype, shape):
    """A prompt whole; in chunks; token by token; beside others; with two threads; in a cache of zeros."""
    num_tokens = 300
    qkv = random_qkv(shape, num_tokens)
    attend = program(shape, qkv, isa=isa)
    (whole,) = attend.run(
        one_sequence(range(num_tokens), 0, shape.block_size), native_cache(shape, dtype, 20)
    )
    for edges in [(0, 1, 8, 72, 300), (0, 255, 256, 257, 258, 300), (0, *range(40, 301))]:
        blocks = native_cache(shape, dtype, 20, fill=0)
        for start, stop in pairwise(edges):
            (y,) = attend.run(one_sequence(range(start, stop), stop, shape.block_size), blocks)
            assert_same_bits(y, whole[start:stop])
    two_threads = program(shape, qkv, isa=isa, num_threads=2)
    rows = [range(17), range(100), range(1), range(65)]
    batch = packed_sequences([(r, len(r)) for r in rows], shape.block_size)
    (y,) = two_threads.run(batch, native_cache(shape, dtype, batch.block_tables.size))
    assert_same_bits(y, np.concatenate([whole[: len(r)] for r in rows]))


@BY_ISA
@BY_DTYPE
def test_a_dominant_key_in_any_partition(isa, dtype):
    """Scores far apart: the softmax's maximum moves from partition to partition."""
    shape = Shape(1, 3, 16, 16, 16)
    q, k, v = (x.copy() for x in random_qkv(shape, 600))
    k[[0, 300, 599]] *= 40
    k[[10, 400]] *= -40
    attend = program(shape, (q, k, v), isa=isa)
    batch = one_sequence(range(600))
    (y,) = attend.run(batch, native_cache(shape, dtype, 38))
    blocks = PagedCache([shape.spec], dtype, 38, 16)
    tensors = map(torch.from_numpy, (q, k, v))
    context = Context(tensor_batch(batch), blocks)
    expected = ReferenceOps().attention(*tensors, context, shape.spec, shape.scale).numpy()
    assert_close(y, expected, tolerance=1e-4)  # scores of some 1e3 have errors of 1e-4


@BY_ISA
@BY_DTYPE
def test_each_layer_has_its_own_keys(isa, dtype):
    shapes = Shape(2, 2, 16, 16, 16), Shape(1, 2, 8, 24, 16)
    inputs = [table for shape in shapes for table in random_qkv(shape, 40)]

    def build(chosen, ops, *values):
        outputs = [
            ops.attention(*values[3 * i : 3 * i + 3], Context(layer=i), shape.spec, shape.scale)
            for i, shape in enumerate(shapes)
        ]
        return [outputs[chosen]]

    batch = one_sequence(range(40))
    for chosen, shape in enumerate(shapes):
        blocks = _native.KVCache([(s.num_kv_heads, s.key_dim, s.value_dim) for s in shapes], dtype, 3, 16)
        (y,) = OpProgram(partial(build, chosen), *inputs, isa=isa).run(batch, blocks)
        alone = program(shape, random_qkv(shape, 40), isa=isa)
        assert_same_bits(y, alone.run(batch, native_cache(shape, dtype, 3))[0])


@BY_DTYPE
@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[4], SHAPES[7]], ids=["64", "80", "8"])
def test_amx_and_avx512_differ_with_a_bf16_cache_only(dtype, shape):
    """Scores from near ties to far apart, so that some weights are nearly zero."""
    if not {"amx", "avx512"} <= set(ISAS):
        pytest.skip("this machine has no AMX")
    q, k, v = (x.copy() for x in random_qkv(shape, 300))
    q *= np.geomspace(1e-3, 10, 300, dtype=np.float32)[:, None]
    v *= np.geomspace(1e-3, 1e3, 300, dtype=np.float32)[:, None]
    batch = one_sequence(range(300), 0, shape.block_size)
    amx, avx512 = (
        program(shape, (q, k, v), isa=isa).run(batch, native_cache(shape, dtype, 20))[0]
        for isa in ("amx", "avx512")
    )
    if dtype == "bf16":  # the tiles multiply several bfloat16 terms, vectors one float32 number
        assert_close(amx, avx512, 2 * TOLERANCE)  # each is as near to the reference as allowed
    else:
        assert_same_bits(amx, avx512)
