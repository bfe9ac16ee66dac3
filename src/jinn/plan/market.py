"""What the big buyers spend and what tokens sell for, and what a budget buys of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from jinn.plan.chips import rows
from jinn.plan.economics import MILLION, YEAR
from jinn.plan.plans import ServePlan, check_finite, plan_serving
from jinn.plan.scenario import ServeScenario
from jinn.plan.tables import ScenarioError, quantity, share, table, text


@dataclass(frozen=True, slots=True)
class Spending:
    """Capital spending of a company; `year` is None for what is not a calendar year's."""

    company: str
    year: int | None
    period: str
    amount: float  # in `currency`
    currency: str
    kind: str
    definition: str
    source: str
    confidence: str


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """A list price per million tokens; `cached_input` is None where none is listed."""

    provider: str
    model: str
    tier: str
    input: float
    cached_input: float | None
    output: float
    currency: str
    as_of: str
    source: str
    confidence: str


@cache
def spending() -> tuple[Spending, ...]:
    return tuple(
        Spending(
            row["company"],
            int(row["year"]) if row["year"] else None,
            row["period"],
            float(row["amount_bn"]) * 1e9,
            row["currency"],
            row["kind"],
            row["definition"],
            row["source"],
            row["confidence"],
        )
        for row in rows("capex.csv")
    )


@cache
def token_prices() -> tuple[TokenPrice, ...]:
    return tuple(
        TokenPrice(
            row["provider"],
            row["model"],
            row["tier"],
            float(row["input"]),
            float(row["cached_input"]) if row["cached_input"] else None,
            float(row["output"]),
            row["currency"],
            row["as_of"],
            row["source"],
            row["confidence"],
        )
        for row in rows("api_prices.csv")
    )


def columns() -> tuple[tuple[int, ...], dict[str, dict[int, float]]]:
    """Years, and each company's US dollars by calendar year: what the grouped column chart draws."""
    companies: dict[str, dict[int, float]] = {}
    for one in spending():
        if one.year is not None and one.kind == "capex" and one.currency == "USD":
            companies.setdefault(one.company, {})[one.year] = one.amount
    years = sorted({year for amounts in companies.values() for year in amounts})
    return tuple(years), companies


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetTable:
    """[budget]: money for machines and for the buildings around them, spent evenly over some years."""

    amount: float = quantity("$", positive=True)
    years: float = quantity("years", 3.0, positive=True, high=50.0)
    machine_share: float = share(0.7)  # the rest goes into land, buildings, power and cooling

    def __post_init__(self) -> None:
        if self.machine_share == 0:
            raise ScenarioError("machine_share must be more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketScenario:
    """A whole scenario of `jinn plan market`: a budget, and in [serve] what it is to serve."""

    name: str = text("market")
    budget: BudgetTable = table(BudgetTable)
    serve: ServeScenario = table(ServeScenario)


@dataclass(frozen=True, slots=True, kw_only=True)
class Purchase:
    """What a budget buys. Token rates are at the utilisation that the plan's load allows."""

    scenario: MarketScenario
    plan: ServePlan
    chips: float
    chips_per_year: float
    watts: float
    input_rate: float  # tokens per second of all chips
    output_rate: float
    operating: float  # a year, of all chips
    tokens_to_break_even: float | None  # of both kinds, in the plan's mix
    break_even_utilization: float | None  # of the machines' whole life
    cost_per_million: float


def purchase(scenario: MarketScenario) -> Purchase:
    """Raises ScenarioError where chips are not bought, or a fact is missing."""
    plan = plan_serving(scenario.serve)
    if plan.case.cost.mode != "buy":
        raise ScenarioError("serve.cost.mode must be 'buy': a budget for rent buys no chips")
    fleet, outcome, budget = plan.outcome.fleet, plan.outcome, scenario.budget
    chips = budget.amount * budget.machine_share / (outcome.capital / fleet.chips)
    scale = chips / fleet.chips
    operating = (outcome.operating - outcome.cost_parts.get("people", 0.0)) * scale
    operating += outcome.cost_parts.get("people", 0.0)
    life = plan.case.cost.depreciation
    spent = budget.amount + operating * life / YEAR
    rates = plan.case.input_rate * scale, plan.case.output_rate * scale
    sold = sum(rates) * life
    revenue = outcome.revenue * scale * life / YEAR
    return Purchase(
        scenario=scenario,
        plan=plan,
        chips=chips,
        chips_per_year=chips / budget.years,
        watts=chips * (plan.case.chip_power or 0.0) * plan.case.cost.pue,
        input_rate=rates[0],
        output_rate=rates[1],
        operating=operating,
        tokens_to_break_even=spent / revenue * sold if revenue else None,
        break_even_utilization=spent / revenue * fleet.utilization if revenue else None,
        cost_per_million=spent / sold * MILLION,
    )


def as_json(found: Purchase | None) -> dict[str, Any]:
    """The market's tables, and what a budget buys."""
    result: dict[str, Any] = {
        "capex": [asdict(one) for one in spending()],
        "prices": [asdict(price) for price in token_prices()],
    }
    if found is not None:
        plan = found.plan
        result["budget"] = {
            "amount": found.scenario.budget.amount,
            "years": found.scenario.budget.years,
            "currency": plan.scenario.currency,
            "chip": plan.chip.name,
            "chips": found.chips,
            "chips_per_year": found.chips_per_year,
            "megawatts": found.watts / 1e6,
            "input_tokens_per_second": found.input_rate,
            "output_tokens_per_second": found.output_rate,
            "operating_per_year": found.operating,
            "tokens_to_break_even": found.tokens_to_break_even,
            "break_even_utilization": found.break_even_utilization,
            "cost_per_million_tokens": found.cost_per_million,
        }
    check_finite(result)
    return result


def bars(amounts: Mapping[str, Mapping[int, float]], years: Sequence[int], width: int = 40) -> list[str]:
    """The column chart for a terminal, lying down: a bar for each company and year."""
    most = max(amount for by_year in amounts.values() for amount in by_year.values())
    name_width = max(len(name) for name in amounts)
    lines = []
    for name, by_year in amounts.items():
        for year in years:
            if year in by_year:
                bar = "█" * max(1, round(by_year[year] / most * width))
                label = name if year == min(by_year) else ""
                lines.append(f"{label:<{name_width}}  {year}  {bar} {by_year[year] / 1e9:.1f}")
    return lines
