from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jinn.plan.chips import Chip, Fact, find_chip
from jinn.plan.efficiency import Efficiency, find_efficiency, published
from jinn.plan.serving import Drafting, Instance, Workload, full_load, shared_load
from jinn.plan.shapes import shape_of
from jinn.plan.speed import Machine, Placement, Step, distinct_experts, step_seconds, total
from jinn.plan.tables import ScenarioError, read

SHAPES = {name: shape_of(name) for name in ("Qwen3-8B", "Qwen3-30B-A3B", "Qwen3-Next-80B-A3B", "DeepSeek-V3")}
EXACT = Efficiency(
    linear=1.0, experts=1.0, attention=1.0, weights=1.0, kv=1.0, link=1.0, collective=0.0,
    layer=0.0, step=0.0, request=0.0, first_token=0.0, tile=1.0,
)  # fmt: skip


def changed(chip, **factors):
    facts = {
        name: Fact(fact.value * factors.get(name, 1.0), 0, 0, "", "", "") for name, fact in chip.facts.items()
    }
    return Chip(chip.name, facts)


PLACEMENTS = st.sampled_from(
    [Placement(), Placement(tp=4), Placement(pp=2), Placement(dp=16, ep=16), Placement(tp=2, dp=8, ep=16)]
)
STEPS = st.one_of(
    st.builds(Step.prefill, st.integers(1, 20_000), st.floats(1, 50_000), st.integers(1, 64)),
    st.builds(Step.decode, st.integers(1, 2000), st.floats(1, 100_000), st.integers(1, 4)),
)
EFFICIENCIES = st.builds(
    Efficiency,
    **{name: st.floats(0.05, 1) for name in ("linear", "experts", "attention", "weights", "kv", "link")},
    overlap=st.floats(0, 1),
    tile=st.floats(1, 128),
    unpack=st.floats(0, 100),
    few=st.floats(1, 100),
)
ANY = (st.sampled_from(sorted(SHAPES)), EFFICIENCIES, PLACEMENTS, STEPS)


@settings(max_examples=60)
@given(*ANY, st.floats(1, 100), st.sampled_from(["bandwidth", "bf16", "scaleup", "scaleout"]))
def test_a_better_chip_is_never_slower(name, efficiency, placement, step, factor, fact):
    chip = find_chip("H800")
    slow = step_seconds(SHAPES[name], Machine(chip, efficiency), placement, step)
    fast = step_seconds(SHAPES[name], Machine(changed(chip, **{fact: factor}), efficiency), placement, step)
    assert total(fast) <= total(slow) * (1 + 1e-9)


@settings(max_examples=60)
@given(*ANY, st.floats(1, 10))
def test_more_tokens_are_never_faster_and_nothing_is_nan(name, efficiency, placement, step, factor):
    machine = Machine(find_chip("H800"), efficiency)
    times = step_seconds(SHAPES[name], machine, placement, step)
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in times.values())
    more = step.part(factor)
    assert total(step_seconds(SHAPES[name], machine, placement, more)) >= total(times) * (1 - 1e-9)


def test_a_dense_step_by_hand():
    """Every matrix is read once and multiplied once; keys and values are read once per sequence."""
    chip, shape = find_chip("H100"), SHAPES["Qwen3-8B"]
    work = shape.work
    times = step_seconds(shape, Machine(chip, EXACT), Placement(), Step.decode(4, 1000))
    matrices = sum(layer.count * m.num_bytes for layer in work.layers for m in layer.matrices)
    assert times["linears"] == pytest.approx(matrices / 3350e9)
    assert times["head"] == pytest.approx(work.head.num_bytes / 3350e9)
    assert times["attention"] == pytest.approx(4 * 1000 * 147_456 / 3350e9)
    many = step_seconds(shape, Machine(chip, EXACT), Placement(), Step.prefill(100_000, 10))
    assert many["linears"] == pytest.approx(100_000 * matrices / 989e12)  # 2 operations for 2 bytes


def test_what_few_rows_cost():
    chip, shape = changed(find_chip("H100"), bandwidth=1e9), SHAPES["Qwen3-30B-A3B"]

    def seconds(kind, num_tokens, **changes):
        machine = Machine(chip, replace(EXACT, **changes))
        return step_seconds(shape, machine, Placement(), Step.decode(num_tokens, 10))[kind]

    row, row_of_experts = seconds("linears", 1), seconds("experts", 1)
    assert seconds("linears", 4, tile=64.0) == pytest.approx(64 * row)
    assert seconds("linears", 4, unpack=10.0) == pytest.approx(14 * row)
    assert seconds("linears", 4, unpack=10.0, few=3.0) == pytest.approx(12 * row)
    assert seconds("linears", 5, unpack=10.0, few=3.0) == pytest.approx(15 * row)
    assert seconds("linears", 100, unpack=10.0, few=3.0) == pytest.approx(110 * row)
    assert seconds("experts", 1, tile=64.0) == pytest.approx((1 + 63 / 2) * row_of_experts), (
        "8 experts of a row"
    )
    assert seconds("experts", 1, unpack=10.0, few=3.0) == pytest.approx(3 * row_of_experts)
    assert seconds("experts", 1, unpack=1.0, few=3.0) == pytest.approx(2 * row_of_experts)


def test_states_are_read_and_written():
    chip, shape = find_chip("H100"), SHAPES["Qwen3-Next-80B-A3B"]
    times = step_seconds(shape, Machine(chip, EXACT), Placement(), Step.decode(8, 1000))
    assert times["recurrence"] == pytest.approx(2 * 8 * shape.state_bytes_per_sequence / 3350e9)


@pytest.mark.parametrize(("tokens", "expected"), [(1, 10), (32, 240), (128, 471)])
def test_distinct_experts(tokens, expected):
    assert distinct_experts(512, 10, tokens) == pytest.approx(expected, abs=1)


def test_distinct_experts_against_draws():
    import random

    rng = random.Random(0)
    counts = [len({e for _ in range(20) for e in rng.sample(range(64), 4)}) for _ in range(2000)]
    assert distinct_experts(64, 4, 20) == pytest.approx(sum(counts) / len(counts), rel=0.01)


def test_a_ring():
    chip, shape = find_chip("H100"), SHAPES["Qwen3-8B"]
    times = step_seconds(shape, Machine(chip, EXACT), Placement(tp=4), Step.prefill(1000, 10))
    assert times["tensor exchange"] == pytest.approx(36 * 2 * 2 * 3 / 4 * 1000 * 4096 * 2 / 450e9)


def test_halves_hide_the_exchange():
    shape, placement, step = SHAPES["DeepSeek-V3"], Placement(dp=32, ep=32), Step.prefill(16384, 2048, 4)
    plain = step_seconds(shape, Machine(find_chip("H800"), replace(EXACT, overlap=1e-9)), placement, step)
    hidden = step_seconds(shape, Machine(find_chip("H800"), replace(EXACT, overlap=1.0)), placement, step)
    shorter = min(plain["expert exchange"], total(plain) - plain["expert exchange"])
    assert total(plain) - total(hidden) == pytest.approx(shorter, rel=1e-6)


@settings(max_examples=40)
@given(st.sampled_from(sorted(SHAPES)), PLACEMENTS, st.floats(0, 500), st.floats(1, 100_000))
def test_memory_adds_up(name, placement, num_seqs, positions):
    machine = Machine(find_chip("H800"), EXACT)
    instance = Instance(SHAPES[name], machine, placement)
    memory = instance.memory(num_seqs, positions)
    more = instance.memory(num_seqs + 1, positions)
    assert sum(more.values()) - sum(memory.values()) == pytest.approx(instance.sequence_bytes(positions))
    most = instance.max_num_seqs(positions)
    assert sum(instance.memory(most, positions).values()) == pytest.approx(80e9)


def test_all_weights_lie_somewhere():
    """Over all chips the weights are there once, and what is replicated as often as there are chips."""
    machine, shape = Machine(find_chip("H800"), EXACT), SHAPES["Qwen3-8B"]
    parts = Instance(shape, machine, Placement(tp=4)).memory_parts
    assert 4 * parts["weights"] == pytest.approx(shape.work.weight_bytes, rel=2e-4)
    moe = SHAPES["Qwen3-30B-A3B"]
    spread = Instance(moe, machine, Placement(dp=8, ep=8)).memory_parts["weights"]
    experts = sum(la.count * m.num_bytes for la in moe.work.layers for m in la.matrices if m.is_expert)
    assert spread == pytest.approx(experts / 8 + moe.work.weight_bytes - experts, rel=1e-4)


def test_drafts():
    assert Drafting(3, 0.5).tokens_per_step == 1 + 0.5 + 0.25 + 0.125
    machine = Machine(find_chip("H800"), find_efficiency("", "vllm", "mla", "bf16"))
    plain = Instance(SHAPES["DeepSeek-V3"], machine, Placement(dp=64, ep=64))
    drafting = replace(plain, drafting=Drafting(1, 0.85))
    assert drafting.token_seconds(8, 4000) < plain.token_seconds(8, 4000)
    assert replace(plain, drafting=Drafting(1, 0.0)).token_seconds(8, 4000) > plain.token_seconds(8, 4000)


def test_loads_agree():
    """The load of 20 sequences always running is that of the rate at which 20 run."""
    machine = Machine(find_chip("H100"), find_efficiency("NVIDIA H100 SXM", "vllm", "dense", "bf16"))
    instance, workload = Instance(SHAPES["Qwen3-8B"], machine, Placement(), 1000), Workload(1000, 200)
    full = full_load(instance, workload, 20)
    again = shared_load(instance, workload, full.request_rate)
    assert again.num_seqs == pytest.approx(20, rel=0.1)
    assert shared_load(instance, workload, 1000.0) is None


def test_efficiencies():
    for row in published():
        assert row.provenance in {"measured", "calibrated", "assumed"}
        assert row.source
    assert find_efficiency("NVIDIA H20", "sglang", "dense", "fp8").provenance == "calibrated"
    assert find_efficiency("NVIDIA H20", "sglang", "moe", "fp8").provenance == "assumed"
    assert find_efficiency("Google TPU v5e", "sglang", "moe", "fp8").provenance == "assumed"
    own = Efficiency(
        chip="NVIDIA H20", engine="sglang", linear=0.1, experts=0.1, attention=0.1, weights=0.1, kv=0.1
    )
    assert find_efficiency("NVIDIA H20", "sglang", "moe", "fp8", [own]) is own


@pytest.mark.parametrize("name", ["linear", "kv", "overlap", "link"])
def test_efficiencies_over_one_are_refused(name):
    values = dict.fromkeys(("linear", "experts", "attention", "weights", "kv"), 0.5) | {name: 1.2}
    with pytest.raises(ScenarioError, match=rf"efficiencies\[0\].{name} must be at most 1, not 1.2"):
        read(Efficiency, values, "efficiencies[0]")
