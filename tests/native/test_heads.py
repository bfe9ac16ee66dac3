"""Ops that know columns as heads: cut, joined, and multiplied by a matrix each. And hidden states given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jinn import _native
from jinn.ops.native import NativeOps, Recording, batch_arrays, compile_program
from jinn.ops.protocol import Context
from jinn.ops.reference import ReferenceOps

from .compare import assert_close, assert_same_bits
from .programs import (
    FORMATS,
    ISAS,
    POOLS,
    OpProgram,
    columns,
    one_sequence,
    pack,
    pack_experts,
    parameter,
    run_op,
    whole_blocks,
)

BY_ISA = pytest.mark.parametrize("isa", ISAS)
BY_ACTIVATIONS = pytest.mark.parametrize("activations", ["int12", "mixed", "int8", "bf16", "f32"])


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("num_heads", "widths"), [(1, (512, 64)), (3, (5, 7)), (4, (128, 64)), (2, (1,))])
@pytest.mark.parametrize("num_rows", [1, 17, 65])
def test_heads_are_cut_and_joined(num_heads, widths, num_rows):
    """And what is cut may be columns of something wider."""
    inner = random(num_rows, num_heads * sum(widths))
    x = np.pad(inner, ((0, 0), (3, 5)), constant_values=np.nan)

    def split(ops, v):
        return ops.split_heads(columns(v, 3, inner.shape[1]), num_heads, widths)

    expected = ReferenceOps().split_heads(torch.from_numpy(inner), num_heads, widths)
    for run, expected_run in zip(run_op(split, x), expected, strict=True):
        assert_same_bits(run, expected_run.numpy())
    (joined,) = run_op(lambda ops, v: [ops.join_heads(split(ops, v), num_heads)], x)
    assert_same_bits(joined, inner)


@pytest.mark.parametrize(("num_heads", "widths"), [(3, (5, 7)), (4, (128, 64))])
def test_joined_heads_interleave(num_heads, widths):
    values = [random(5, num_heads * width, seed=width) for width in widths]
    expected = ReferenceOps().join_heads([torch.from_numpy(v) for v in values], num_heads)
    (actual,) = run_op(lambda ops, *inputs: [ops.join_heads(inputs, num_heads)], *values)
    assert_same_bits(actual, expected.numpy())


def head_linear(x, weight, **settings):
    node = parameter(weight)
    return run_op(lambda ops, v: [ops.head_linear(v, node)], x, **settings)[0]


@BY_ISA
@BY_ACTIVATIONS
@pytest.mark.parametrize("format_name", FORMATS)
def test_each_head_is_a_linear_of_its_own(isa, activations, format_name):
    """To the bit."""
    num_heads, inner, cols = 3, whole_blocks(format_name, 40), 24
    values, x = random(num_heads, cols, inner) / 8, random(37, num_heads * inner, seed=1)
    settings = {"isa": isa, "activations": activations}
    actual = head_linear(x, pack_experts(values, format_name), **settings)
    for head in range(num_heads):
        node = parameter(pack(values[head], format_name))
        own = np.ascontiguousarray(x[:, head * inner : (head + 1) * inner])
        (expected,) = run_op(lambda ops, v, n=node: list(ops.linear(v, [n], Context())), own, **settings)
        assert_same_bits(actual[:, head * cols : (head + 1) * cols], expected)


@BY_ISA
@pytest.mark.parametrize("num_rows", [1, 2, 16, 63, 64, 65])
@pytest.mark.parametrize("shape", [(4, 6, 10), (128, 32, 16), (1, 16, 64)])
def test_the_reference_agrees(isa, num_rows, shape):
    values, x = random(*shape) / 4, random(num_rows, shape[0] * shape[2], seed=1)
    expected = ReferenceOps().head_linear(torch.from_numpy(x), parameter(torch.from_numpy(values)))
    actual = head_linear(x, pack_experts(values), isa=isa, activations="f32", num_threads=2)
    assert_close(actual, expected.numpy())


@pytest.mark.parametrize(
    ("shape", "cols", "error"), [((3, 8, 16), 32, "all heads"), ((3, 8, 15), 45, "pairs of bf16")]
)
def test_heads_that_do_not_fit_are_refused(shape, cols, error):
    format_name = "BF16" if "bf16" in error else "F32"
    weight = _native.pack_experts(
        POOLS[1],
        [np.zeros(shape[1] * shape[2] * (2 if format_name == "BF16" else 4), np.uint8)] * shape[0],
        format_name,
        *shape[1:],
    )
    with pytest.raises(ValueError, match=error):
        head_linear(random(2, cols), weight)


@pytest.mark.parametrize("num_rows", [1, 17, 65])
def test_hidden_states_are_those_of_the_batch(num_rows):
    hidden = random(num_rows, 40)
    program = OpProgram(
        lambda ops, x: [ops.add(x, ops.given_hidden(40, Context()))], np.zeros((num_rows, 40), np.float32)
    )
    batch = one_sequence(range(num_rows))
    assert_same_bits(program.run(replace(batch, hidden=hidden))[0], hidden)
    for wrong in (hidden[:-1], hidden[:, :39].copy()):
        with pytest.raises(ValueError, match="hidden states of each token"):
            program.run(replace(batch, hidden=wrong))


def test_a_program_may_keep_hidden_states_of_all_tokens():
    """Beside the rows that are wanted, and nothing takes their memory."""
    x = random(5, 16)
    ops, ctx = NativeOps("f32"), Context()
    value = ops.embed(parameter(pack(x)), ctx)
    hidden = ops.add(value, value)
    rows = ops.select_rows(hidden, ctx)
    for _ in range(3):
        rows = ops.add(rows, rows)
    recording = Recording(ops.instructions, rows, hidden)
    program = compile_program(recording, POOLS[1], _native.choose_kernels(""))
    batch = replace(one_sequence(range(5)), logit_rows=np.array([4, 1], np.int32))
    cache = _native.KVCache([(1, 4, 4)], "f32", 1, 16)
    ran = _native.run(program, cache, None, 5, batch_arrays(batch))
    assert_same_bits(ran.copy(), 16 * x[[4, 1]])
    assert_same_bits(ran.copy_hidden(), 2 * x)
    plain = compile_program(Recording(ops.instructions, rows), POOLS[1], _native.choose_kernels(""))
    with pytest.raises(ValueError, match="keeps no hidden states"):
        _native.run(plain, cache, None, 5, batch_arrays(batch)).copy_hidden()
