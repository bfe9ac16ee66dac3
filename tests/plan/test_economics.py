from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinn.plan.economics import (
    DAY,
    YEAR,
    Case,
    CostTable,
    Lengths,
    PriceTable,
    PriceTier,
    evaluate,
    irr,
    peak_to_mean,
)
from jinn.plan.tables import ScenarioError, read

EXAMPLE = Path(__file__).parents[2] / "examples" / "plan" / "deepseek-disclosure.toml"


def case(**changes):
    """100 chips' worth of work, bought at 20,000 each."""
    values = {
        "input_rate": 80_000.0,
        "cached_share": 0.5,
        "output_rate": 30_000.0,
        "input_capacity": 1_000.0,
        "output_capacity": 500.0,
        "input_chips": 1,
        "output_chips": 1,
        "chip_price": 18_000.0,
        "chip_power": 500.0,
        "chip_rent": 2 / 3600,
        "cost": CostTable(
            mode="buy",
            server_price=16_000.0,
            depreciation=4 * YEAR,
            pue=1.25,
            power_use=0.8,
            electricity=0.1,
            people=100_000.0,
        ),
        "prices": PriceTable(input=0.5, cached_input=0.1, output=2.0),
    }
    return Case(**{**values, **changes})


def test_disclosed_system(run):
    """DeepSeek's figures follow from its rates, and a changed rate changes them."""
    result = run("plan", "serve", EXAMPLE, "--json")
    assert result.exit_code == 0
    plan = json.loads(result.stdout)
    assert plan["nodes"] == pytest.approx(226.9, rel=0.005)
    assert plan["cost_per_day"] == pytest.approx(87_072, rel=0.005)
    assert plan["revenue_per_day"] == pytest.approx(562_027, rel=0.005)
    assert plan["markup"] == pytest.approx(5.45, rel=0.005)
    assert plan["gross_margin"] == pytest.approx(0.845, rel=0.005)
    slower = json.loads(
        run("plan", "serve", EXAMPLE, "--json", "--set", "measured.output_rate=7400 tokens/s").stdout
    )
    assert slower["nodes"] == pytest.approx(95.48 + 2 * 131.38, rel=1e-3)


def test_by_hand():
    """The worked example of docs/plan.md."""
    outcome = evaluate(case())
    assert outcome.fleet.chips == 100  # 40,000 / 1,000 + 30,000 / 500
    assert outcome.capital == 2_000_000  # 100 * (18,000 + 16,000 / 8)
    kilowatt_hours = 100 * 0.5 * 0.8 * 1.25 * 8760
    assert outcome.cost_parts == pytest.approx(
        {"depreciation": 500_000, "electricity": 0.1 * kilowatt_hours, "people": 100_000}
    )
    revenue = (40_000 * 0.5 + 40_000 * 0.1 + 30_000 * 2.0) / 1e6 * YEAR
    assert outcome.revenue == pytest.approx(revenue)
    cost = 500_000 + 43_800 + 100_000
    assert outcome.cost == pytest.approx(cost)
    assert outcome.gross_margin == pytest.approx((revenue - cost) / revenue)
    assert outcome.payback == pytest.approx(2_000_000 / (revenue - 143_800) * YEAR)
    assert outcome.break_even_utilization == pytest.approx(cost / revenue)
    assert outcome.cost_per_million["input"] == pytest.approx(cost * 0.4 / (40_000 * YEAR / 1e6))
    assert outcome.cost_per_million["output"] == pytest.approx(cost * 0.6 / (30_000 * YEAR / 1e6))
    rate = outcome.irr
    assert sum((revenue - 143_800) / (1 + rate) ** year for year in (1, 2, 3, 4)) == pytest.approx(2e6)


def test_irr_of_a_known_annuity():
    assert irr(1000, 1100, 1, 0) == pytest.approx(0.10)
    assert irr(1000, 0, 2, 1210) == pytest.approx(0.10)
    assert irr(1000, 0, 2, 0) is None
    assert irr(1000, 100, 5, 0) == pytest.approx(-0.1940, abs=1e-3)


def test_peaks_take_whole_machines():
    fleet = evaluate(case(input_capacity=999.0, peak_to_mean=2.0, load_target=0.8)).fleet
    assert fleet.input_instances == math.ceil(2 * 40_000 / 999 / 0.8)
    assert fleet.output_instances == 150
    assert fleet.utilization == pytest.approx((40_000 / 999 + 60) / (101 + 150))


def test_shared_instances_are_counted_together():
    shared = evaluate(case(input_capacity=80_000.0, output_capacity=60_000.0, is_shared=True)).fleet
    assert shared.chips == pytest.approx(1)
    assert evaluate(case(input_capacity=80_000.0, output_capacity=60_000.0)).fleet.chips == 2


def test_discounts():
    prices = PriceTable(input=1.0, output=1.0, batch_share=0.5, batch_discount=0.5, free_share=0.2)
    assert prices.paid_share() == pytest.approx(0.8 * 0.75)


def test_tiers_by_the_length_of_the_input():
    tiers = (PriceTier(up_to=1000.0, input=1.0, output=2.0), PriceTier(input=3.0, output=4.0))
    lengths = Lengths(mean=1000.0, variation=1.0)
    outcome = evaluate(case(prices=PriceTable(tiers=tiers), lengths=lengths, cached_share=0.0))
    requests, tokens = lengths.below(1000, 0), lengths.below(1000, 1)
    assert 0 < tokens < requests < 1  # short requests have fewer tokens
    assert outcome.revenue_parts["output"] == pytest.approx(
        30_000 * (2 * requests + 4 * (1 - requests)) * YEAR / 1e6
    )
    assert outcome.revenue_parts["input"] == pytest.approx(
        80_000 * (1 * tokens + 3 * (1 - tokens)) * YEAR / 1e6
    )


def test_lognormal_shares_against_draws():
    import random

    rng, lengths = random.Random(0), Lengths(mean=500.0, variation=1.5)
    sigma = math.sqrt(math.log1p(1.5**2))
    draws = [rng.lognormvariate(math.log(500) - sigma**2 / 2, sigma) for _ in range(200_000)]
    assert lengths.below(400, 0) == pytest.approx(sum(d <= 400 for d in draws) / len(draws), abs=5e-3)
    assert lengths.below(400, 1) == pytest.approx(sum(d for d in draws if d <= 400) / sum(draws), abs=1e-2)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"input": 1, "output": 2, "tiers": [{"input": 1, "output": 2}]}, "contradict tiers"),
        ({"input": 1}, "input and output are missing"),
        ({"input": 1, "cached_input": 2, "output": 3}, "cached_input 2 costs more than input 1"),
        ({"input": -1, "output": 3}, "prices.input must be at least 0"),
        ({"input": 1, "output": 3, "free_share": 1.5}, "prices.free_share must be at most 1"),
        (
            {"tiers": [{"up_to": 9, "input": 1, "output": 1}, {"up_to": 9, "input": 1, "output": 1}]},
            r"prices.tiers\[1\].up_to 9 must be more than 9",
        ),
        ({"tiers": [{"up_to": 9, "input": 1, "output": 1}]}, r"prices.tiers\[0\].up_to must be left out"),
        ({"input": 1, "output": 1, "off_peak": {"hours": 25, "discount": 0, "load": 0}}, "off_peak.hours"),
        ({"input": 1, "output": 1, "colour": 1}, "prices.colour is not a field"),
    ],
)
def test_contradictory_prices(values, error):
    with pytest.raises(ScenarioError, match=error):
        read(PriceTable, values, "prices")


@pytest.mark.parametrize("missing", ["chip_price", "chip_power"])
def test_a_missing_fact_is_named(missing):
    with pytest.raises(ScenarioError, match=f"cost.{missing} is missing"):
        evaluate(case(**{missing: None}))


CASES = st.builds(
    case,
    input_rate=st.floats(1, 1e9),
    cached_share=st.floats(0, 0.99),
    output_rate=st.floats(1, 1e9),
    input_capacity=st.floats(1, 1e6),
    output_capacity=st.floats(1, 1e6),
    input_chips=st.integers(1, 512),
    peak_to_mean=st.floats(1, 10),
    load_target=st.floats(0.1, 1),
    is_shared=st.booleans(),
    cost=st.builds(
        CostTable,
        mode=st.sampled_from(["rent", "buy"]),
        residual=st.floats(0, 1),
        spare=st.floats(0, 1),
        people=st.floats(0, 1e9),
        is_elastic=st.booleans(),
    ),
)


@given(CASES)
def test_parts_add_up_and_nothing_is_nan(one):
    outcome = evaluate(one)
    assert outcome.cost == pytest.approx(sum(outcome.cost_parts.values()))
    assert outcome.revenue == pytest.approx(sum(outcome.revenue_parts.values()))
    by_kind = (
        outcome.cost_per_million["input"] * one.input_rate * (1 - one.cached_share)
        + outcome.cost_per_million["output"] * one.output_rate
    )
    assert by_kind * YEAR / 1e6 == pytest.approx(outcome.cost)
    figures = [outcome.gross_margin, outcome.markup, outcome.payback, outcome.irr, outcome.capital]
    assert all(figure is None or math.isfinite(figure) for figure in figures)
    assert outcome.fleet.utilization <= 1 + 1e-9


@given(CASES, st.floats(1, 100))
def test_more_tokens_are_never_cheaper_in_total(one, factor):
    more = replace(one, input_rate=one.input_rate * factor, output_rate=one.output_rate * factor)
    assert evaluate(more).cost >= evaluate(one).cost * (1 - 1e-9)


@given(CASES, st.floats(1, 100))
def test_faster_chips_never_cost_more(one, factor):
    assert evaluate(replace(one, speed_factor=factor)).cost <= evaluate(one).cost * (1 + 1e-9)


def test_daily_curve():
    assert peak_to_mean([1.0, 3.0]) == 1.5
    with pytest.raises(ScenarioError, match="above 0"):
        peak_to_mean([0.0, 0.0])
    assert DAY * 365 == YEAR
