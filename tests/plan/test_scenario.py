from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from jinn.plan.plans import as_json, check_finite, plan_serving
from jinn.plan.scenario import ServeScenario, read_scenario
from jinn.plan.tables import ScenarioError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "plan").glob("*.toml"))
QUICK = {
    "model.name": "Qwen3-8B",
    "chip": "H20",
    "engine.name": "sglang",
    "traffic.requests": 20,
    "traffic.input_tokens": 2000,
    "traffic.output_tokens": 300,
}


def plan(**options):
    given = {name.replace("__", "."): value for name, value in options.items()}
    return plan_serving(read_scenario(ServeScenario, None, {**QUICK, **given}))


def test_a_plan():
    targets = {"targets.first_token": "2 s", "targets.token": "50 ms"}
    result = as_json(plan(**targets))
    assert result["chips"] >= 1
    assert result["speed"]["first_token_seconds"] <= 2
    assert result["speed"]["token_seconds"] <= 0.05
    memory = result["placement"]["generating"]["memory_per_chip"]
    assert sum(memory.values()) <= 96e9
    assert sum(result["cost_parts_per_year"].values()) == pytest.approx(result["cost_per_year"])
    assert result["cost_per_day"] * 365 == pytest.approx(result["cost_per_year"])


def test_more_traffic_takes_more_chips_and_better_chips_fewer():
    few, many = plan(), plan(traffic__requests=2000)
    assert many.outcome.fleet.chips > 10 * few.outcome.fleet.chips
    assert plan(chip="H200", traffic__requests=2000).outcome.fleet.chips < many.outcome.fleet.chips


def test_a_fixed_placement():
    found = plan(placement__tp=2, placement__num_seqs=16, engine__pools="shared")
    assert str(found.generating.instance.placement) == "TP2"
    assert found.generating.num_seqs == 16


def test_separate_pools():
    found = plan(engine__pools="separate")
    assert found.pools == "separate"
    assert found.reading.input_rate > 0 == found.reading.output_rate


def test_the_cheapest_chip_wins():
    both = plan(chip=["H20", "H200"], cost__mode="buy")
    alone = {name: plan(chip=name, cost__mode="buy").outcome.cost for name in ("H20", "H200")}
    assert both.outcome.cost == min(alone.values())
    assert both.others


def test_a_chip_without_a_price_is_planned_and_says_so():
    result = as_json(plan(chip="Google TPU7x"))
    assert result["is_priced"] is False
    assert result["chips"] >= 1


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("targets__token", "1 us", "no plan meets the targets .* between tokens with 1 sequence"),
        ("targets__first_token", "1 ms", "no plan meets the targets .* to the first token"),
        (
            "model__name",
            "DeepSeek-V3",
            "no plan meets .* needs .*B of memory per chip, which has 96GB",
        ),
        ("chip", "PPU", "bandwidth is not known"),
        ("chip", "Kunlun P800", "is not known"),
        ("traffic__requests", -1, "traffic.requests must be more than 0, not -1"),
        ("traffic__requests", "3 GB", "traffic.requests '3 GB' is not in units of requests/s"),
        ("traffic__requests", math.nan, "traffic.requests must be a finite number"),
        ("traffic__users", 5, "requests, users or input_rate must say how much"),
        ("traffic__cached_share", 1.0, "cached_share must be less than 1"),
        ("traffic__input_tokens", 1e6, "more than the model's 40960"),
        ("targets__load", 1.5, "targets.load must be at most 0.99"),
        ("engine__name", "", "engine.name must be text"),
        ("engine__acceptance", 0.5, "acceptance is given, but drafts is 0"),
        ("placement__tp", 0, "placement.tp must be from 1"),
        ("placement__tp", 2.5, "placement.tp must be a whole number"),
        ("placement__tp", 16, "leaves the 8 chips that the fast network joins"),
        ("placement__ep", 4, "EP4, but the model has no experts"),
        ("cost__pue", 0.5, "cost.pue must be at least 1"),
        ("cost__colour", 1, "cost.colour is not a field; there are mode, rent"),
        ("model__precision", "fp3", "model.precision must be one of bf16, fp8, int8, int4"),
        ("currency", "CNY", "exchange.CNY is missing"),
        ("currency", "pounds", "currency must be one of USD, CNY, EUR"),
        ("traffic__load", [], "traffic.load must be a list with something in it"),
        ("traffic__load", [1, -1], r"traffic.load\[1\] must be at least 0"),
        ("cost__mode", "rent", "cost.rent is missing"),
    ],
)
def test_bad_input(option, value, error):
    changes = {"engine__max_chips": 4} if option.startswith("model__name") else {}
    with pytest.raises(ScenarioError, match=error):
        plan(**{option: value}, **changes)


def test_currencies():
    dollars = plan(cost__mode="buy")
    yuan = plan_serving(
        read_scenario(
            ServeScenario, None, {**QUICK, "cost.mode": "buy", "currency": "CNY", "exchange.CNY": 7.0}
        )
    )
    assert yuan.outcome.capital == pytest.approx(7 * dollars.outcome.capital)


def test_no_nan_can_be_printed():
    with pytest.raises(ValueError, match=r"result.a\[1\].b is nan"):
        check_finite({"a": [1.0, {"b": math.nan}]})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path, run):
    command = {"training": "train", "budget-53e9": "market"}.get(path.stem, "serve")
    started = time.process_time()
    result = run("plan", command, path, "--json")
    assert time.process_time() - started < 10
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)


def test_command_line(run, fail):
    result = run("plan", "serve", "--model", "Qwen3-8B", "--chip", "H20", "--set", "cost.mode=buy", "--json")
    assert json.loads(result.stdout)["chip"] == "NVIDIA H20"
    table = run("plan", "serve", "--model", "Qwen3-8B", "--chip", "H20").stdout
    assert "cost of 1M output tokens" in table
    assert "chip is missing" in fail("plan", "serve", "--model", "Qwen3-8B")
    assert "--set must be FIELD=VALUE" in fail("plan", "serve", "--set", "x")
    assert "NVIDIA H20" in run("plan", "chips").stdout
    assert "LMSYS" in run("plan", "chips", "H20").stdout
    assert "cannot be read" in fail("plan", "serve", "missing.toml")


def test_bad_toml(tmp_path, fail):
    path = tmp_path / "bad.toml"
    path.write_text("chip = [")
    assert "is not TOML" in fail("plan", "serve", path)
