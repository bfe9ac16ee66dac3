"""What adapters add to linears, against the reference; nothing of it depends on who shares a batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from jinn.ops.protocol import Batch, Context, LowRank
from jinn.ops.reference import ReferenceOps, tensor_batch

from .compare import assert_close, assert_same_bits
from .programs import ISAS, OpProgram, pack, packed_sequences, parameter

BY_ISA = pytest.mark.parametrize("isa", ISAS)
COLS, WIDTHS = 68, (48, 20, 33)
RANKS = ((16, 3, 17), (None, 5, 40), (1, None, None))  # of each adapter, in each of three linears


def random_values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def adapted(is_native: bool, ranks=RANKS) -> list:
    """Three linears of one input, with what each adapter adds to them."""
    make = pack if is_native else torch.from_numpy
    nodes = []
    for p, width in enumerate(WIDTHS):
        node = parameter(make(random_values(width, COLS, seed=p)), random_values(width, seed=p))
        if not is_native:
            node.bias = torch.from_numpy(node.bias)
        node.adapters = [
            rank
            and LowRank(make(random_values(rank, COLS, seed=p)), make(random_values(width, rank, seed=p)))
            for rank in (row[p] for row in ranks)
        ]
        nodes.append(node)
    return nodes


def batch_of(lengths: list[int], adapters: list[int]) -> Batch:
    """Sequences one after another: token `i` of the batch reads row `i` of the input."""
    ends = np.cumsum(lengths)
    sequences = [(range(end - n, end), n) for n, end in zip(lengths, ends.tolist(), strict=True)]
    return replace(packed_sequences(sequences), adapters=np.array(adapters, np.int32))


def program(x: np.ndarray, isa: str, num_threads: int = 1) -> OpProgram:
    nodes = adapted(is_native=True)
    return OpProgram(
        lambda ops, x: ops.linear(x, nodes, Context()),
        x,
        isa=isa,
        num_threads=num_threads,
        activations="f32",
    )


@BY_ISA
def test_values(isa):
    x = random_values(170, COLS)
    batch = batch_of([70, 1, 3, 1, 65, 30], [0, 2, -1, 1, 1, 0])
    expected = ReferenceOps().linear(
        torch.from_numpy(x), adapted(is_native=False), Context(tensor_batch(batch))
    )
    for y, reference in zip(program(x, isa).run(batch), expected, strict=True):
        assert_close(y, reference.numpy())


@BY_ISA
def test_a_batch_without_adapters_is_as_if_there_were_none(isa):
    x = random_values(20, COLS)
    nodes = [parameter(node.weight, node.bias) for node in adapted(is_native=True)]
    bare = OpProgram(lambda ops, x: ops.linear(x, nodes, Context()), x, isa=isa, activations="f32")
    own = program(x, isa)
    for adapters in ([], [-1, -1]):
        batch = batch_of([13, 7], adapters)
        for y, expected in zip(own.run(batch), bare.run(batch), strict=True):
            assert_same_bits(y, expected)


@BY_ISA
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, num_threads):
    """Each sequence alone, and cut into single tokens, has the bits that it has among others."""
    lengths, adapters = [66, 1, 5, 2, 1, 9], [1, 0, -1, 0, 2, 1]
    x = random_values(sum(lengths), COLS)
    together = program(x, isa, num_threads).run(batch_of(lengths, adapters))
    start = 0
    for length, adapter in zip(lengths, adapters, strict=True):
        rows = x[start : start + length]
        for cut in ([length], [1] * length):
            alone = program(rows, isa).run(batch_of(cut, [adapter] * len(cut)))
            for y, among in zip(alone, together, strict=True):
                assert_same_bits(y, among[start : start + length])
        start += length


def test_what_follows_waits_for_the_sum():
    """An add that would be fused into the linear, and an op in between, read what the adapter added."""
    x, batch = random_values(5, COLS), batch_of([5], [0])

    def build(ops, value, node):
        (y,) = ops.linear(value, [node], Context(None if batch is None else tensor_batch(batch)))
        return [ops.add(ops.silu_mul(y, y), y)]

    node, reference = adapted(is_native=True)[0], adapted(is_native=False)[0]
    own = OpProgram(
        lambda ops, value: build(ops, value, node), x, activations="f32", is_fused=True, is_poisoned=False
    )
    (expected,) = build(ReferenceOps(), torch.from_numpy(x), reference)
    assert_close(own.run(batch)[0], expected.numpy())


@pytest.mark.parametrize(
    ("adapters", "message"),
    [([3], "no such adapter"), ([-2], "no such adapter"), ([0, 0], "an adapter per sequence")],
)
def test_a_batch_names_adapters_that_there_are(adapters, message):
    x = random_values(3, COLS)
    with pytest.raises(ValueError, match=message):
        program(x, "").run(batch_of([3], adapters))


def test_linears_on_rows_of_logits_take_no_adapters():
    node = adapted(is_native=True)[0]
    x = random_values(3, COLS)
    with pytest.raises(ValueError, match="a row per token"):
        OpProgram(lambda ops, x: ops.linear(ops.select_rows(x, Context()), [node], Context()), x)
