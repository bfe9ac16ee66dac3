"""Rotary positions against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jinn.models.rope import plain_frequencies
from jinn.ops.protocol import Context, Rope
from jinn.ops.reference import ReferenceOps, tensor_batch

from .compare import assert_close, assert_same_bits
from .programs import ISAS, OpProgram, columns, one_sequence, run_op

BY_ISA = pytest.mark.parametrize("isa", ISAS)


def rope_of(rotary_dim, is_interleaved=False, attention_factor=1.0):
    return Rope(tuple(plain_frequencies(10000.0, rotary_dim).tolist()), attention_factor, is_interleaved)


def expected_rope(x, batch, rope, num_heads):
    context = Context(tensor_batch(batch))
    return ReferenceOps().rope(torch.from_numpy(x), context, rope, num_heads).numpy()


@BY_ISA
@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim"), [(4, 4), (16, 16), (20, 20), (64, 64), (64, 16), (80, 20), (128, 128)]
)
def test_values(isa, is_interleaved, head_dim, rotary_dim):
    """Whole and partial heads, at near and far positions, with an attention factor."""
    num_heads, rope = 3, rope_of(rotary_dim, is_interleaved, 1.25)
    x = np.random.default_rng(0).standard_normal((65, num_heads * head_dim)).astype(np.float32)
    for context_len in (65, 2048):
        batch = one_sequence(range(65), context_len)
        program = OpProgram(lambda ops, x: [ops.rope(x, Context(), rope, num_heads)], x, isa=isa)
        (y,) = program.run(batch)
        assert_close(y, expected_rope(x, batch, rope, num_heads))


@BY_ISA
def test_two_ropes_and_strided_inputs(isa):
    """q and k are columns of one buffer; each rope has its own table."""
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    ropes = rope_of(16), rope_of(8)

    def build(ops, x):
        first = ops.rope(columns(x, 0, 64), Context(), ropes[0], 4)
        second = ops.rope(columns(x, 64, 32), Context(), ropes[1], 2)
        return [ops.add(columns(first, 0, 32), second)]

    (y,) = run_op(build, x, isa=isa)
    batch = one_sequence(range(5))
    first = expected_rope(np.ascontiguousarray(x[:, :64]), batch, ropes[0], 4)
    second = expected_rope(np.ascontiguousarray(x[:, 64:]), batch, ropes[1], 2)
    assert_close(y, first[:, :32] + second)


@BY_ISA
def test_a_position_gives_the_same_bits_in_every_batch(isa):
    x = np.random.default_rng(2).standard_normal((65, 64)).astype(np.float32)
    rope = rope_of(32)
    program = OpProgram(lambda ops, x: [ops.rope(x, Context(), rope, 2)], x, isa=isa)
    (whole,) = program.run(one_sequence(range(65)))
    for start, stop in [(0, 1), (3, 4), (0, 64), (5, 65), (17, 33)]:
        (part,) = program.run(one_sequence(range(start, stop), stop))
        assert_same_bits(part, whole[start:stop])
