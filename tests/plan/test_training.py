from __future__ import annotations

import math

import pytest

from jinn.plan.shapes import shape_of
from jinn.plan.tables import ScenarioError, read
from jinn.plan.training import (
    FailureTable,
    TrainScenario,
    as_json,
    expected_goodput,
    plan_training,
    training_flops,
)


def scenario(**changes):
    values = {
        "model": {"name": "Qwen3-8B"},
        "chip": "H100",
        "run": {"tokens": "1e12 tokens", "sequence": 4096, "batch": "4194304 tokens"},
        "parallel": {"chips": 256, "tp": 2, "pp": 2},
    }
    for dotted, value in changes.items():
        table, _, name = dotted.partition("__")
        values[table] = {**values.get(table, {}), name: value} if name else value
    return read(TrainScenario, values)


def test_flops_are_six_per_parameter_and_token_and_attention():
    shape = shape_of("Qwen3-8B")
    matrices = 7.57e9
    assert training_flops(shape, 4096) == pytest.approx(6 * matrices + 3 * 589_824 * 2048, rel=1e-3)


def test_time_by_hand():
    plan = plan_training(scenario(run__mfu=0.4, failures__chip_mtbf="1e12 h"))
    seconds = 1e12 * plan.flops_per_token / (256 * 989e12 * 0.4)
    assert plan.seconds == pytest.approx(seconds, rel=1e-3)
    assert plan.chip_hours == pytest.approx(seconds * 256 / 3600, rel=1e-3)
    assert plan.cost == pytest.approx(plan.chip_hours * 3)


def test_the_bubble():
    plan = plan_training(scenario(parallel__pp=4))
    micro_batches = 4194304 / (256 / 8) / 4096
    assert plan.bubble == pytest.approx(3 / (micro_batches + 3))
    assert plan_training(scenario(parallel__virtual_stages=4)).bubble < plan_training(scenario()).bubble


def test_memory_adds_up_and_sharding_spreads_it():
    sharded, whole = plan_training(scenario()), plan_training(scenario(parallel__is_sharded=False))
    assert sum(sharded.memory.values()) <= 80e9
    ranks = 64
    states = ("weights", "gradients", "master weights", "optimizer")
    for name in states:
        assert whole.memory[name] == pytest.approx(ranks * sharded.memory[name])
    assert sum(whole.memory[name] for name in states) == pytest.approx(18 * 8_190_735_360 / 4)


def test_recomputation_saves_memory_and_takes_time():
    kinds = [plan_training(scenario(run__recomputation=kind)) for kind in ("none", "selective", "full")]
    activations = [plan.memory["activations"] for plan in kinds]
    assert activations == sorted(activations, reverse=True)
    assert kinds[2].seconds > kinds[1].seconds >= kinds[0].seconds


def test_goodput():
    failures = FailureTable(chip_mtbf=1e8, restart=100.0, checkpoint=10.0)
    goodput, interval = expected_goodput(failures, 1000)
    assert interval == pytest.approx(math.sqrt(2 * 10 * 1e5))  # Young
    assert goodput == pytest.approx((1 - 10 / (interval + 10)) / (1 + (interval / 2 + 100) / 1e5))
    best = [expected_goodput(FailureTable(chip_mtbf=1e8, checkpoint=10.0, interval=i), 1000)[0] for i in
            (interval / 3, interval, 3 * interval)]  # fmt: skip
    assert best[1] == max(best)
    assert expected_goodput(failures, 100_000)[0] < goodput


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"parallel__chips": 255}, "parallel.chips 255 is no multiple of tp x pp x cp = 4"),
        ({"parallel__pp": 64}, "parallel.pp 64 x virtual_stages 1 is more than 36 layers"),
        ({"parallel__tp": 16}, "parallel.tp 16 leaves the 8 chips"),
        ({"run__batch": 1000}, "run.batch 1000 is less than"),
        ({"run__tokens": -1}, "run.tokens must be more than 0"),
        ({"run__mfu": 1.2}, "run.mfu must be at most 1"),
        (
            {"parallel__is_sharded": False, "parallel__tp": 1, "parallel__pp": 1},
            "a chip needs .* GB of 80 GB",
        ),
        ({"model": {"name": "Qwen3-8B", "precision": "fp8"}, "chip": "A100"}, "fp8 is not known"),
        ({"chip": "Kunlun P800", "parallel": {"chips": 1}}, "memory is not known"),
    ],
)
def test_bad_input(changes, error):
    with pytest.raises(ScenarioError, match=error):
        plan_training(scenario(**changes))


def test_json_has_no_surprises():
    result = as_json(plan_training(scenario()))
    assert all(math.isfinite(value) for value in result.values() if isinstance(value, float))
    assert result["days"] == pytest.approx(result["seconds"] / 86400)


def test_command_line(run):
    result = run(
        "plan", "train", "--model", "Qwen3-8B", "--chip", "H100", "--chips", "64", "--tokens", "1e11 tokens"
    )
    assert result.exit_code == 0
    assert "goodput" in result.stdout
