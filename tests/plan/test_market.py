from __future__ import annotations

import json
from pathlib import Path

import pytest

from jinn.plan.market import MarketScenario, columns, purchase, spending, token_prices
from jinn.plan.scenario import read_scenario
from jinn.plan.tables import ScenarioError

EXAMPLE = Path(__file__).parents[2] / "examples" / "plan" / "budget-53e9.toml"


def bought(**options):
    given = {name.replace("__", "."): value for name, value in options.items()}
    return purchase(read_scenario(MarketScenario, EXAMPLE, given))


def test_capital_spending():
    years, companies = columns()
    assert years == (2022, 2023, 2024, 2025)
    assert set(companies) == {"Amazon", "Microsoft", "Alphabet", "Meta", "Tencent"}
    four = ("Amazon", "Microsoft", "Alphabet", "Meta")
    sums = [sum(companies[name][year] for name in four) / 1e9 for year in years]
    assert sums == pytest.approx([151.1, 147.2, 228.3, 376.0], abs=0.1)
    assert all(one.source and one.definition for one in spending())


def test_token_prices():
    prices = token_prices()
    assert len(prices) >= 17
    for price in prices:
        assert 0 < price.input <= price.output
        assert price.cached_input is None or price.cached_input < price.input
        assert price.source
        assert price.currency in {"USD", "CNY"}


def test_a_budget_by_hand():
    found = bought()
    per_chip = 13_500 + 3_000 + 60_000 / 8
    assert found.chips == pytest.approx(53e9 * 0.7 / per_chip)
    assert found.chips_per_year == pytest.approx(found.chips / 3)
    life = 5.0
    spent = 53e9 + life * found.operating
    rate = found.input_rate + found.output_rate
    assert found.cost_per_million == pytest.approx(spent / (rate * life * 365 * 86400) * 1e6)
    assert 0 < found.break_even_utilization < 1
    scale = found.chips / found.plan.outcome.fleet.chips
    revenue = found.plan.outcome.revenue * scale * life
    assert found.tokens_to_break_even == pytest.approx(spent / revenue * rate * life * 365 * 86400)


def test_twice_the_money_buys_twice_the_chips():
    assert bought(budget__amount="106e9 USD").chips == pytest.approx(2 * bought().chips)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("budget__amount", "-1 USD", "budget.amount must be more than 0"),
        ("budget__machine_share", 0, "budget.machine_share must be more than 0"),
        ("budget__years", "3 tokens", "budget.years '3 tokens' is not in units of years"),
        ("serve__cost__mode", "auto", "serve.cost.mode must be 'buy'"),
    ],
)
def test_bad_input(option, value, error):
    changes = {"serve__chip": "H800"} if value == "auto" else {}
    with pytest.raises(ScenarioError, match=error):
        bought(**{option: value}, **changes)


def test_command_line(run, fail):
    shown = run("plan", "market").stdout
    assert "Amazon" in shown
    assert "131.8" in shown
    assert "gpt-5" in shown
    assert json.loads(run("plan", "market", "--json").stdout)["capex"]
    assert "tokens sold" in run("plan", "market", EXAMPLE, "--budget", "1e9 USD").stdout
    assert "SCENARIO is missing" in fail("plan", "market", "--budget", "1e9 USD")
