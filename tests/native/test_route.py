"""Which experts a token takes and with what weight: every instruction set against the rule itself."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jinn.ops.protocol import RouteSpec
from jinn.ops.reference import ReferenceOps

from .compare import assert_close, assert_same_bits
from .programs import ISAS, OpProgram, pack

BY_ISA = pytest.mark.parametrize("isa", ISAS)
QWEN = RouteSpec(8)
DEEPSEEK = RouteSpec(6, "sigmoid", True, 4, 2, 2.5)
SPECS = {
    "softmax": (32, QWEN),
    "softmax, as they are": (64, RouteSpec(5, is_renormalized=False)),
    "one expert": (8, RouteSpec(1)),
    "all experts": (9, RouteSpec(9)),
    "sigmoid": (17, RouteSpec(3, "sigmoid", scaling=0.5)),
    "groups": (32, DEEPSEEK),
    "groups of two": (16, RouteSpec(4, "sigmoid", False, 8, 3)),
    "softmax in groups": (24, RouteSpec(4, "softmax", True, 3, 2)),
}
BY_SPEC = pytest.mark.parametrize("name", SPECS)
HIDDEN = 40


def router(num_experts, format_name="F32", seed=0, has_bias=True):
    """Scores well apart, and a bias that changes what is chosen."""
    rng = np.random.default_rng(seed)
    weight = pack(rng.standard_normal((num_experts, HIDDEN)).astype(np.float32) / 3, format_name)
    bias = (0.3 * rng.standard_normal(num_experts)).astype(np.float32)
    return SimpleNamespace(weight=weight, **({"e_score_correction_bias": bias} if has_bias else {}))


def random_rows(rows, seed=1):
    return np.random.default_rng(seed).standard_normal((rows, HIDDEN)).astype(np.float32)


def route_program(x, node, spec, **settings):
    def build(ops, x):
        routing = ops.route(x, node, spec)
        return [routing.scores, routing.weights, routing.ids]

    return OpProgram(build, x, **settings)


def routed(x, node, spec, rows=None, **settings):
    """Scores, weights and ids of the rows of x."""
    program = route_program(x, node, spec, **settings)
    scores, weights, ids = program.run_rows(range(len(x)) if rows is None else rows)
    return scores, weights, np.ascontiguousarray(ids).view(np.int32)


def expected_ids(scores, bias, spec):
    """Experts by falling score, those of hidden groups never; a stable sort keeps ties in order of id."""
    ranking = scores + bias
    groups = ranking.reshape(len(scores), spec.num_groups, -1)
    if spec.num_groups > 1:
        sums = np.sort(groups, axis=-1)[..., -2:].sum(-1)
        rank = np.argsort(np.argsort(-sums, axis=-1, kind="stable"), axis=-1, kind="stable")
        groups = np.where(rank[..., None] < spec.num_chosen_groups, groups, -np.inf)
    order = np.argsort(-groups.reshape(len(scores), -1), axis=-1, kind="stable")
    return order[:, : spec.num_experts_per_tok]


def check_routing(scores, weights, ids, bias, spec):
    """Raise AssertionError unless ids are exactly what the scores say, and weights what both say."""
    np.testing.assert_array_equal(ids, expected_ids(scores, bias, spec))
    expected = np.take_along_axis(scores, ids, -1).astype(np.float64)
    if spec.is_renormalized:
        expected /= expected.sum(-1, keepdims=True) + 1e-20
    assert_close(weights, expected * spec.scaling, 1e-6)


def reference_scores(x, node, spec):
    weight = torch.from_numpy(node.weight.dequantize()).double()
    node = SimpleNamespace(weight=weight)
    logits = torch.from_numpy(x).double() @ weight.T
    return (logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()).numpy()


@BY_ISA
@BY_SPEC
@pytest.mark.parametrize("format_name", ["F32", "BF16"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_values(isa, name, format_name, has_bias):
    num_experts, spec = SPECS[name]
    node, x = router(num_experts, format_name, has_bias=has_bias), random_rows(65)
    scores, weights, ids = routed(x, node, spec, isa=isa)
    assert_close(scores, reference_scores(x, node, spec))
    check_routing(scores, weights, ids, getattr(node, "e_score_correction_bias", np.float32(0)), spec)


@BY_ISA
@BY_SPEC
def test_the_reference_chooses_the_same(isa, name):
    num_experts, spec = SPECS[name]
    node, x = router(num_experts), random_rows(65)
    scores, weights, ids = routed(x, node, spec, isa=isa)
    theirs = ReferenceOps().route(
        torch.from_numpy(x),
        SimpleNamespace(
            weight=torch.from_numpy(node.weight.dequantize()),
            e_score_correction_bias=torch.from_numpy(node.e_score_correction_bias),
        ),
        spec,
    )
    np.testing.assert_array_equal(ids, theirs.ids.numpy())
    assert_close(weights, theirs.weights.numpy())
    assert_close(scores, theirs.scores.numpy())


@BY_ISA
@pytest.mark.parametrize("activations", ["int12", "mixed", "int8", "bf16"])
def test_the_router_reads_its_input_as_it_is(isa, activations):
    """However the other linears hold their inputs."""
    node, x = router(32, "BF16"), random_rows(9)
    exact = routed(x, node, QWEN, isa=isa, activations="f32")
    for ours, theirs in zip(routed(x, node, QWEN, isa=isa, activations=activations), exact, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@BY_ISA
@pytest.mark.parametrize("spec", [QWEN, DEEPSEEK])
def test_ties_go_to_the_lower_id(isa, spec):
    """All experts alike, and each twice."""
    same = SimpleNamespace(weight=pack(np.zeros((32, HIDDEN), np.float32)))
    scores, weights, ids = routed(random_rows(5), same, spec, isa=isa)
    check_routing(scores, weights, ids, np.float32(0), spec)
    assert (ids == np.arange(spec.num_experts_per_tok)).all()
    rows = np.random.default_rng(2).standard_normal((16, HIDDEN)).astype(np.float32)
    twice = SimpleNamespace(weight=pack(np.repeat(rows, 2, axis=0)))
    scores, weights, ids = routed(random_rows(20), twice, spec, isa=isa)
    assert (scores[:, ::2] == scores[:, 1::2]).all()
    check_routing(scores, weights, ids, np.float32(0), spec)


@BY_ISA
@pytest.mark.parametrize("spec", [QWEN, DEEPSEEK])
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, spec):
    node, x = router(32), random_rows(65)
    program = route_program(x, node, spec, isa=isa)
    whole = program.run_rows(range(65))
    for count in range(1, 66):
        rows = np.random.default_rng(count).permutation(65)[:count]
        for y, expected in zip(program.run_rows(rows), whole, strict=True):
            assert_same_bits(y, expected[rows])


@BY_ISA
@pytest.mark.parametrize("spec", [QWEN, DEEPSEEK])
def test_scores_that_are_no_numbers_still_choose_experts(isa, spec):
    x = random_rows(4)
    x[1], x[2] = np.nan, np.inf
    node = router(32)
    clean = routed(random_rows(4), node, spec, isa=isa)
    scores, weights, ids = routed(x, node, spec, isa=isa)
    assert not np.isfinite(weights[1]).any()
    for row in ids:
        assert len(set(row.tolist())) == spec.num_experts_per_tok
        assert ((row >= 0) & (row < 32)).all()
    for y, expected in zip((scores, weights, ids), clean, strict=True):
        np.testing.assert_array_equal(y[[0, 3]], expected[[0, 3]])


@BY_ISA
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_extreme_logits(isa, scoring):
    x = np.zeros((2, HIDDEN), np.float32)
    x[:, 0] = [1e4, -1e4]
    rows = np.zeros((4, HIDDEN), np.float32)
    rows[:, 0] = [1, 2, -1, 0.5]
    spec = RouteSpec(2, scoring)
    node = SimpleNamespace(weight=pack(rows))
    scores, weights, ids = routed(x, node, spec, isa=isa)
    assert_close(scores, reference_scores(x, node, spec))
    check_routing(scores, weights, ids, np.float32(0), spec)


@pytest.mark.parametrize("name", ["softmax", "groups"])
def test_the_check_rejects_planted_faults(name):
    num_experts, spec = SPECS[name]
    node, x = router(num_experts), random_rows(30)
    bias = node.e_score_correction_bias
    scores, weights, ids = routed(x, node, spec)
    check_routing(scores, weights, ids, bias, spec)
    chosen = np.take_along_axis(scores, ids, -1)
    biased = chosen + bias[ids]
    faults = {
        "ranks in another order": (weights[:, ::-1], ids[:, ::-1]),
        "the bias left out": (weights, expected_ids(scores, 0, spec)),
        "the bias in the weights": (biased / biased.sum(-1, keepdims=True) * spec.scaling, ids),
        "not renormalized": (chosen * spec.scaling, ids),
        "not scaled": (weights * 1.5, ids),
        "groups ignored" if spec.num_groups > 1 else "one expert off": (
            weights,
            expected_ids(scores, bias, RouteSpec(spec.num_experts_per_tok))
            if spec.num_groups > 1
            else np.roll(ids, 1, axis=0),
        ),
    }
    for wrong_weights, wrong_ids in faults.values():
        with pytest.raises(AssertionError):
            check_routing(scores, wrong_weights, wrong_ids, bias, spec)
    tied = np.full((1, num_experts), 0.5, np.float32)
    last_first = np.arange(num_experts)[None, ::-1][:, : spec.num_experts_per_tok]
    with pytest.raises(AssertionError):
        check_routing(tied, weights[:1], last_first, np.float32(0), spec)


@pytest.mark.parametrize(
    "spec", [RouteSpec(33), RouteSpec(0), RouteSpec(2, num_groups=5), RouteSpec(2, num_groups=32)]
)
def test_what_cannot_be_routed_is_refused(spec):
    with pytest.raises(ValueError, match=r"\[route\] expected"):
        route_program(random_rows(1), router(32), spec)
