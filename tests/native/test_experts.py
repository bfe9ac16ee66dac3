"""Mixtures of experts: each expert as a dense block would have it, added in rank order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jinn import _native
from jinn.ops.protocol import Context, RouteSpec
from jinn.ops.reference import ReferenceOps

from .compare import assert_close, assert_same_bits
from .programs import FORMATS, ISAS, POOLS, OpProgram, pack, pack_experts, parameter, run_op, whole_blocks

ACTIVATIONS = ("int12", "mixed", "int8", "bf16", "f32")
BY_ISA = pytest.mark.parametrize("isa", ISAS)
BY_FORMAT = pytest.mark.parametrize("format_name", FORMATS)
BY_ACTIVATIONS = pytest.mark.parametrize("activations", ACTIVATIONS)
PARTS = ("gate_proj", "up_proj", "down_proj")


class Mixture:
    """Random experts, a router, and rows of which many like the same experts."""

    def __init__(self, num_experts=8, hidden=64, inner=32, formats=("F32",) * 3, num_rows=65, seed=0):
        rng = np.random.default_rng(seed)
        shapes = [(num_experts, inner, hidden)] * 2 + [(num_experts, hidden, inner)]
        self.values = [
            (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32) for shape in shapes
        ]
        self.formats = formats
        packs = [pack_experts(values, name) for values, name in zip(self.values, formats, strict=True)]
        self.node = SimpleNamespace(**{part: parameter(p) for part, p in zip(PARTS, packs, strict=True)})
        self.router = parameter(pack((rng.standard_normal((num_experts, hidden)) / 3).astype(np.float32)))
        x = rng.standard_normal((num_rows, hidden)) * rng.choice([0.1, 1, 10], (num_rows, 1))
        x[rng.random(x.shape) < 1 / 48] *= 30  # outliers
        self.x = (x + 0.7 * rng.standard_normal(hidden)).astype(np.float32)

    def program(self, spec, **settings):
        return OpProgram(
            lambda ops, x: [ops.experts(x, ops.route(x, self.router, spec), self.node)], self.x, **settings
        )

    def run(self, spec, **settings):
        return self.program(spec, **settings).run_rows(range(len(self.x)))[0]

    def routing(self, spec, **settings):
        """Weights and ids of each row."""

        def build(ops, x):
            routing = ops.route(x, self.router, spec)
            return [routing.scores, routing.weights, routing.ids]

        _, weights, ids = run_op(build, self.x, **settings)
        return weights, np.ascontiguousarray(ids).view(np.int32)

    def dense(self, expert, **settings):
        """One expert's output of every row, from ops that know nothing of experts."""
        gate, up, down = (
            parameter(pack(values[expert], name))
            for values, name in zip(self.values, self.formats, strict=True)
        )

        def build(ops, x):
            hidden = ops.silu_mul(*ops.linear(x, [gate, up], Context()))
            return ops.linear(hidden, [down], Context())

        return run_op(build, self.x, **settings)[0]

    def expected(self, spec, order=None, **settings):
        """Dense outputs, weighted and added by rank; `order` permutes the ranks."""
        weights, ids = self.routing(spec, **settings)
        outputs = np.stack([self.dense(e, **settings) for e in range(len(self.values[0]))])
        rows = np.arange(len(ids))
        total = np.zeros_like(outputs[0])
        for rank in range(ids.shape[1]) if order is None else order:
            total = add_product(weights[:, rank, None], outputs[ids[:, rank], rows], total, **settings)
        return total


def add_product(weight, y, total, isa="", **_):
    """total + weight * y in float32: rounded once where there is a fused instruction."""
    if (isa or ISAS[0]) == "portable":
        return total + weight * y
    return (weight.astype(np.float64) * y + total).astype(np.float32)


@BY_ISA
@BY_FORMAT
@BY_ACTIVATIONS
def test_each_expert_is_a_dense_block(isa, format_name, activations):
    """To the bit, in rank order."""
    hidden, inner = whole_blocks(format_name, 64), whole_blocks(format_name, 32)
    mixture = Mixture(6, hidden, inner, (format_name,) * 3, num_rows=40)
    spec, settings = RouteSpec(3), {"isa": isa, "activations": activations}
    assert_same_bits(mixture.run(spec, **settings), mixture.expected(spec, **settings))


@BY_ISA
@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "hidden", "inner"),
    [(8, 1, 40, 24), (8, 8, 32, 48), (16, 4, 33, 7), (64, 8, 96, 64), (9, 2, 16, 1)],
)
@pytest.mark.parametrize("num_rows", [1, 2, 17, 65])
def test_shapes(isa, num_experts, num_chosen, hidden, inner, num_rows):
    mixture = Mixture(num_experts, hidden, inner, num_rows=num_rows)
    spec = RouteSpec(num_chosen)
    assert_same_bits(mixture.run(spec, isa=isa), mixture.expected(spec, isa=isa))


@BY_ISA
@pytest.mark.parametrize("spec", [RouteSpec(4), RouteSpec(4, "sigmoid", True, 4, 2, 2.5)])
def test_the_reference_agrees(isa, spec):
    mixture = Mixture(num_experts=16, num_rows=40)
    x, router, *parts = map(
        torch.from_numpy, (mixture.x, mixture.router.weight.dequantize(), *mixture.values)
    )
    node = SimpleNamespace(**{part: parameter(values) for part, values in zip(PARTS, parts, strict=True)})
    ops = ReferenceOps()
    expected = ops.experts(x, ops.route(x, parameter(router), spec), node).numpy()
    assert_close(mixture.run(spec, isa=isa, activations="f32"), expected)


@BY_ISA
@BY_ACTIVATIONS
@pytest.mark.parametrize(
    "formats", [("Q4_0", "Q4_0", "Q8_0"), ("F32", "Q4_1", "BF16"), ("BF16", "BF16", "Q4_0")]
)
def test_parts_of_several_formats(isa, activations, formats):
    mixture = Mixture(formats=formats, num_rows=20)
    spec, settings = RouteSpec(3), {"isa": isa, "activations": activations}
    assert_same_bits(mixture.run(spec, **settings), mixture.expected(spec, **settings))


@BY_ISA
@BY_ACTIVATIONS
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, activations):
    """Every row count from 1 to 65, rows at other places in the batch, and two threads: the same bits."""
    mixture = Mixture(formats=("Q4_0", "Q4_0", "Q8_0"))
    spec, settings = RouteSpec(3), {"isa": isa, "activations": activations}
    program = mixture.program(spec, **settings)
    (whole,) = program.run_rows(range(65))
    rng = np.random.default_rng(3)
    for count in range(1, 66):
        rows = rng.permutation(65)[:count]
        assert_same_bits(program.run_rows(rows)[0], whole[rows])
    assert_same_bits(mixture.run(spec, num_threads=2, **settings), whole)


@BY_ISA
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("num_rows", [1, 15, 16, 17, 64, 65, 130])
def test_all_rows_of_the_same_experts(isa, num_threads, num_rows):
    """Groups as long as the batch, beside a row that likes others."""
    mixture = Mixture(formats=("Q4_0",) * 3, num_rows=num_rows)
    mixture.x[:] = mixture.x[0]
    mixture.x[num_rows // 2] *= -1
    spec, settings = RouteSpec(2), {"isa": isa, "num_threads": num_threads}
    assert_same_bits(mixture.run(spec, **settings), mixture.expected(spec, **settings))


def test_rank_order_is_visible():
    """The ranks added in another order give other bits, so that the tests above would see it."""
    mixture, spec = Mixture(), RouteSpec(4)
    assert_same_bits(mixture.run(spec), mixture.expected(spec))
    for order in ((3, 2, 1, 0), (1, 0, 2, 3), (0, 2, 1, 3)):
        if order[:2] == (1, 0):  # the first two commute where products are rounded before they are added
            continue
        with pytest.raises(AssertionError):
            assert_same_bits(mixture.run(spec), mixture.expected(spec, order))


@BY_ISA
def test_a_row_that_is_no_number_spoils_no_other(isa):
    mixture = Mixture(formats=("Q4_0",) * 3, num_rows=20)
    whole = mixture.run(RouteSpec(3), isa=isa)
    mixture.x[7] = np.nan
    spoiled = mixture.run(RouteSpec(3), isa=isa)
    others = np.arange(20) != 7
    assert_same_bits(spoiled[others], whole[others])


@BY_ISA
def test_two_mixtures_may_share_a_routing(isa):
    """Rows are grouped once for both."""
    first, second = Mixture(seed=0), Mixture(seed=1)
    spec = RouteSpec(3)

    def build(ops, x):
        routing = ops.route(x, first.router, spec)
        y = ops.add(ops.experts(x, routing, first.node), ops.experts(x, routing, second.node))
        assert [ins.name for ins in ops.instructions].count("group_rows") == 1
        return [y]

    (y,) = run_op(build, first.x, isa=isa)
    second.x, second.router = first.x, first.router
    assert_same_bits(y, first.run(spec, isa=isa) + second.run(spec, isa=isa))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("rows", [1, 15, 16, 33])
def test_packing_keeps_the_values(format_name, rows):
    cols = whole_blocks(format_name, 64)
    values = np.random.default_rng(0).standard_normal((5, rows, cols)).astype(np.float32)
    packed = pack_experts(values, format_name)
    assert packed.shape == values.shape
    assert packed.format == format_name
    each = np.stack([pack(matrix, format_name).dequantize() for matrix in values])
    assert_same_bits(packed.dequantize(), each)


def test_packing_chosen_rows():
    """As of a tensor that holds gate above up."""
    values = np.random.default_rng(0).standard_normal((3, 40, 8)).astype(np.float32)
    sources = [matrix.view(np.uint8).reshape(-1) for matrix in values]
    order = np.arange(20, 40, dtype=np.int32)
    packed = _native.pack_experts(POOLS[2], sources, "F32", 20, 8, order)
    assert_same_bits(packed.dequantize(), values[:, 20:])


def test_what_cannot_be_packed_is_refused():
    source = np.zeros(4 * 16 * 8, np.uint8)
    order = np.arange(16, dtype=np.int32)
    for sources, rows, row_order in [
        ([], 16, None),
        ([source, source[:-4]], 16, None),
        ([source], 15, None),
        ([source], 16, order + 1),
        ([source], 16, order - 1),
        ([source], 16, order[:-1]),
    ]:
        with pytest.raises(ValueError, match=r"\[pack_experts\]"):
            _native.pack_experts(POOLS[1], sources, "F32", rows, 8, row_order)
    with pytest.raises(ValueError, match="whole blocks"):
        _native.pack_experts(POOLS[1], [source], "Q4_0", 16, 8)
