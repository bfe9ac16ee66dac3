from __future__ import annotations

from dataclasses import replace

import pytest

from jinn.plan.economics import CostTable, evaluate
from jinn.plan.tables import ScenarioError, read
from jinn.plan.uncertainty import INPUTS, Range, monte_carlo, tornado

from .test_economics import case

RANGES = (Range(input="speed", low=0.5, high=1.5), Range(input="prices", low=0.9, high=1.1))


def margin(outcome):
    return outcome.gross_margin


def test_the_widest_swing_is_first_and_is_what_evaluating_gives():
    swings = tornado(case(), RANGES, margin)
    assert [swing.input for swing in swings] == ["speed", "prices"]
    assert swings[0].at_low == evaluate(case(speed_factor=0.5)).gross_margin
    assert swings[1].at_high == evaluate(case(price_factor=1.1)).gross_margin


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_matters_and_one_changes_nothing(name):
    mode = "rent" if name == "rent" else "buy"
    one = case(cost=CostTable(mode=mode, people=1e5, network_price=9.0))
    assert evaluate(INPUTS[name](one, 1.0)) == evaluate(one)
    assert evaluate(INPUTS[name](one, 1.3)) != evaluate(one)


def test_the_band_is_the_same_for_the_same_seed():
    figures = {"margin": margin}
    band = monte_carlo(case(), RANGES, figures, 300)["margin"]
    assert band == monte_carlo(case(), RANGES, figures, 300)["margin"]
    assert band != monte_carlo(case(), RANGES, figures, 300, seed=1)["margin"]
    assert band.p10 < band.p50 < band.p90


def test_what_never_pays_for_itself_is_at_the_far_end():
    payback = {"payback": lambda outcome: outcome.payback}
    dear = case(cost=replace(case().cost, people=1.5e6))
    prices = (Range(input="prices", low=0.01, high=1.01),)
    band = monte_carlo(dear, prices, payback, 400)["payback"]
    assert band.p10 is not None
    assert band.p90 is None


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"input": "luck", "low": 0.5, "high": 2}, "input must be one of speed, demand"),
        ({"input": "speed", "low": 1.5, "high": 2}, "low must be at most 1"),
        ({"input": "speed", "low": 1, "high": 1}, "low and high are the same"),
    ],
)
def test_bad_ranges(values, error):
    with pytest.raises(ScenarioError, match=error):
        read(Range, values, "uncertain[0]")
