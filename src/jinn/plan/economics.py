"""From capacity to money: what a fleet costs, what its tokens bring in, and when it has paid for itself.

Amounts are in the scenario's currency, times in seconds, tokens in tokens. Every result is a sum of named
parts, so that a report can show what a figure is made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from jinn.plan.tables import ScenarioError, choice, count, flag, quantity, share, table, tables

DAY, YEAR = 86400.0, 365 * 86400.0
MILLION = 1e6
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """[cost]: what owning or renting takes. Prices of chips left out here are the catalogue's.

    With "auto", chips are rented where a rent is known and bought where only a price is.
    """

    mode: str = choice(("auto", "rent", "buy"), "auto")
    rent: float | None = quantity("$/s", None)  # per chip
    chip_price: float | None = quantity("$", None)
    chip_power: float | None = quantity("W", None)
    chips_per_server: int = count(8)
    server_price: float = quantity("$", 0.0)  # without its chips
    server_power: float = quantity("W", 0.0)  # without its chips
    network_price: float = quantity("$", 0.0)  # per chip: switches, optics, cables
    depreciation: float = quantity("s", 5 * YEAR, positive=True)
    residual: float = share(0.0)  # of the price, left when written off
    pue: float = quantity("1", 1.3, low=1.0, high=5.0)  # power of the building over that of the machines
    power_use: float = share(0.8)  # mean power over the rated one
    electricity: float = quantity("$/kWh", 0.08)
    space: float = quantity("$/kW/month", 0.0)  # of rated power
    people: float = quantity("$/year", 0.0)
    maintenance: float = share(0.0)  # of the purchase, a year
    spare: float = quantity("1", 0.0, high=1.0)  # more machines than the load needs
    is_elastic: bool = flag(False)  # machines cost only while the load needs them


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTier:
    """Prices per million tokens of requests with at most `up_to` input tokens."""

    up_to: float = quantity("tokens", math.inf, positive=True)
    input: float = quantity("$/Mtokens")
    cached_input: float | None = quantity("$/Mtokens", None)  # None: as input
    output: float = quantity("$/Mtokens")

    def __post_init__(self) -> None:
        if self.cached_input is not None and self.cached_input > self.input:
            raise ScenarioError(f"cached_input {self.cached_input:g} costs more than input {self.input:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPeak:
    """A discount in some hours of the day."""

    hours: float = quantity("h", positive=True, high=24.0)
    discount: float = share()
    load: float | None = share(None)  # of a day's tokens, in these hours; None: as many as in others

    @property
    def token_share(self) -> float:
        return self.hours / 24 if self.load is None else self.load


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """[prices]: one price for all, or tiers by the length of the input."""

    input: float | None = quantity("$/Mtokens", None)
    cached_input: float | None = quantity("$/Mtokens", None)
    output: float | None = quantity("$/Mtokens", None)
    tiers: tuple[PriceTier, ...] = tables(PriceTier)
    batch_share: float = share(0.0)  # of all tokens
    batch_discount: float = share(0.5)
    free_share: float = share(0.0)  # of all tokens, not paid for
    off_peak: OffPeak | None = table(OffPeak, None)

    def __post_init__(self) -> None:
        if self.tiers and (self.input, self.cached_input, self.output) != (None, None, None):
            raise ScenarioError("input, cached_input and output contradict tiers: give one or the other")
        if not self.tiers and (self.input is None or self.output is None):
            raise ScenarioError("input and output are missing, or tiers")
        for index, (lower, upper) in enumerate(pairwise(self.tiers)):
            if upper.up_to <= lower.up_to:
                raise ScenarioError(
                    f"tiers[{index + 1}].up_to {upper.up_to:g} must be more than {lower.up_to:g} before it"
                )
        if self.tiers and self.tiers[-1].up_to != math.inf:
            raise ScenarioError(
                f"tiers[{len(self.tiers) - 1}].up_to must be left out: longer inputs need a price"
            )
        if not self.tiers:
            self._flat()

    def _flat(self) -> PriceTier:
        input_price, output_price = self.input or 0.0, self.output or 0.0
        return PriceTier(input=input_price, cached_input=self.cached_input, output=output_price)

    def all_tiers(self) -> tuple[PriceTier, ...]:
        return self.tiers or (self._flat(),)

    def paid_share(self) -> float:
        """What is left of the list price after batch, off-peak and free tokens."""
        off_peak = self.off_peak.token_share * self.off_peak.discount if self.off_peak else 0.0
        return (1 - self.free_share) * (1 - self.batch_share * self.batch_discount) * (1 - off_peak)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Input lengths, lognormal: mean in tokens, and standard deviation over mean."""

    mean: float
    variation: float

    def below(self, limit: float, moment: int) -> float:
        """The share of requests (moment 0) or of tokens (moment 1) of inputs up to `limit`.

        Partial moments of a lognormal: Phi((ln limit - mu) / sigma - moment * sigma).
        """
        if limit == math.inf:
            return 1.0
        if self.variation == 0:
            return 1.0 if self.mean <= limit else 0.0
        sigma = math.sqrt(math.log1p(self.variation**2))
        mu = math.log(self.mean) - sigma**2 / 2
        return 0.5 * math.erfc(-((math.log(limit) - mu) / sigma - moment * sigma) / math.sqrt(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that money depends on, as plain numbers: sensitivity and Monte Carlo replace some of them.

    Tokens per second are means over a day; capacities are tokens per second of one instance at full load,
    `input_capacity` of tokens that the cache does not have.
    """

    input_rate: float
    cached_share: float
    output_rate: float
    input_capacity: float
    output_capacity: float
    input_chips: int  # of an instance that reads prompts
    output_chips: int  # of an instance that generates
    is_shared: bool = False  # the same instances do both
    peak_to_mean: float = 1.0
    load_target: float = 1.0  # load at peak over capacity, that targets of latency leave room for
    price_factor: float = 1.0
    speed_factor: float = 1.0
    demand_factor: float = 1.0
    chip_price: float | None = None
    chip_power: float | None = None
    chip_rent: float | None = None
    cost: CostTable
    prices: PriceTable | None = None
    lengths: Lengths = field(default=Lengths(mean=1.0, variation=0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Instances and chips; `mean` ones do the work of an average second, the others wait for peaks."""

    mean_input_instances: float
    mean_output_instances: float
    input_instances: float
    output_instances: float
    chips: float
    mean_chips: float
    utilization: float  # of the capacity that is paid for

    @property
    def mean_instances(self) -> float:
        return self.mean_input_instances + self.mean_output_instances


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A year of a fleet. Parts of cost and of revenue add up to their sums."""

    fleet: Fleet
    cost_parts: Mapping[str, float]  # a year
    revenue_parts: Mapping[str, float]  # a year
    capital: float
    operating: float  # a year, without depreciation
    cost_per_million: Mapping[str, float]
    gross_margin: float | None  # (revenue - cost) / revenue
    markup: float | None  # (revenue - cost) / cost
    payback: float | None  # seconds
    break_even_utilization: float | None
    irr: float | None  # a year, over the time of depreciation

    @property
    def cost(self) -> float:
        return sum(self.cost_parts.values())

    @property
    def revenue(self) -> float:
        return sum(self.revenue_parts.values())


def is_priced(case: Case) -> bool:
    """Whether the chips' cost is known at all."""
    return case.cost.mode != "auto"


def settled_mode(cost: CostTable, rent: float | None, price: float | None) -> CostTable:
    """ "auto" as what the facts allow; it stays where they allow neither."""
    if cost.mode != "auto" or (rent is None and price is None):
        return cost
    return replace(cost, mode="rent" if rent is not None else "buy")


def evaluate(case: Case) -> Outcome:
    """Cost, revenue and return of a case. Raises ScenarioError where a price is missing."""
    fleet = fleet_of(case)
    capital = capital_of(case, fleet)
    parts = yearly_cost(case, fleet, capital)
    cost = sum(parts.values())
    operating = cost - parts.get("depreciation", 0.0)
    revenue_parts = yearly_revenue(case)
    revenue = sum(revenue_parts.values())
    cash = revenue - operating
    years = case.cost.depreciation / YEAR
    return Outcome(
        fleet=fleet,
        cost_parts=parts,
        revenue_parts=revenue_parts,
        capital=capital,
        operating=operating,
        cost_per_million=cost_per_million(case, fleet, cost),
        gross_margin=(revenue - cost) / revenue if revenue > 0 else None,
        markup=(revenue - cost) / cost if cost > 0 and revenue_parts else None,
        payback=capital / cash * YEAR if capital > 0 and cash > 0 and revenue_parts else None,
        break_even_utilization=fleet.utilization * cost / revenue if revenue > 0 else None,
        irr=irr(capital, cash, years, capital * case.cost.residual) if capital > 0 and revenue > 0 else None,
    )


def fleet_of(case: Case) -> Fleet:
    """Instances for the peak of both kinds of work, in whole instances unless the fleet is elastic."""
    inputs = case.demand_factor * case.input_rate * (1 - case.cached_share)
    outputs = case.demand_factor * case.output_rate
    mean_input = inputs / (case.input_capacity * case.speed_factor)
    mean_output = outputs / (case.output_capacity * case.speed_factor)
    room = (1 + case.cost.spare) / case.load_target
    if case.cost.is_elastic:
        has_input, has_output = mean_input * room, mean_output * room
    elif case.is_shared:
        both = mean_input + mean_output
        more = _whole(both * case.peak_to_mean * room) / both
        has_input, has_output = mean_input * more, mean_output * more
    else:
        has_input, has_output = (
            float(_whole(mean * case.peak_to_mean * room)) for mean in (mean_input, mean_output)
        )
    chips = has_input * case.input_chips + has_output * case.output_chips
    mean_chips = mean_input * case.input_chips + mean_output * case.output_chips
    return Fleet(
        mean_input_instances=mean_input,
        mean_output_instances=mean_output,
        input_instances=has_input,
        output_instances=has_output,
        chips=chips,
        mean_chips=mean_chips,
        utilization=mean_chips / chips if chips else 0.0,
    )


def _whole(instances: float) -> int:
    return math.ceil(instances - 1e-9)


def capital_of(case: Case, fleet: Fleet) -> float:
    """What buying the fleet takes; 0 if it is rented."""
    if case.cost.mode != "buy":
        return 0.0
    if case.chip_price is None:
        raise ScenarioError("cost.chip_price is missing: the catalogue has no price of this chip")
    per_chip = case.chip_price + case.cost.network_price + case.cost.server_price / case.cost.chips_per_server
    return fleet.chips * per_chip


def yearly_cost(case: Case, fleet: Fleet, capital: float) -> dict[str, float]:
    """By part. Rent has power and space in it; where neither rent nor price is known, chips are left out."""
    cost = case.cost
    parts: dict[str, float] = {}
    if cost.mode == "rent":
        if case.chip_rent is None:
            raise ScenarioError("cost.rent is missing: the catalogue has no rent of this chip")
        parts["rent"] = fleet.chips * case.chip_rent * YEAR
    elif cost.mode == "buy":
        if case.chip_power is None:
            raise ScenarioError("cost.chip_power is missing: the catalogue has no power of this chip")
        watts = fleet.chips * (case.chip_power + cost.server_power / cost.chips_per_server)
        kilowatt_hours = watts * cost.power_use * cost.pue * YEAR / JOULES_PER_KWH
        parts["depreciation"] = capital * (1 - cost.residual) * YEAR / cost.depreciation
        parts["electricity"] = kilowatt_hours * cost.electricity
        parts["space"] = watts / 1e3 * cost.space * 12
        parts["maintenance"] = capital * cost.maintenance
    parts["people"] = cost.people
    return {name: amount for name, amount in parts.items() if amount}


def yearly_revenue(case: Case) -> dict[str, float]:
    """By kind of token; empty without prices."""
    if case.prices is None:
        return {}
    factor = case.prices.paid_share() * case.price_factor * case.demand_factor * YEAR / MILLION
    parts = dict.fromkeys(("input", "cached input", "output"), 0.0)
    before = (0.0, 0.0)
    for tier in case.prices.all_tiers():
        upto = (case.lengths.below(tier.up_to, 0), case.lengths.below(tier.up_to, 1))
        requests, tokens = upto[0] - before[0], upto[1] - before[1]
        cached_price = tier.input if tier.cached_input is None else tier.cached_input
        parts["input"] += case.input_rate * (1 - case.cached_share) * tokens * tier.input * factor
        parts["cached input"] += case.input_rate * case.cached_share * tokens * cached_price * factor
        parts["output"] += case.output_rate * requests * tier.output * factor
        before = upto
    return parts


def cost_per_million(case: Case, fleet: Fleet, cost: float) -> dict[str, float]:
    """Cost by kind, shared by the chips that each kind keeps busy; cached tokens cost no time."""
    rate = MILLION / YEAR / case.demand_factor
    busy = {
        "input": (fleet.mean_input_instances * case.input_chips, case.input_rate * (1 - case.cached_share)),
        "output": (fleet.mean_output_instances * case.output_chips, case.output_rate),
    }
    all_tokens = case.input_rate + case.output_rate
    result = {
        kind: cost * chips / fleet.mean_chips / tokens * rate
        for kind, (chips, tokens) in busy.items()
        if tokens and fleet.mean_chips
    }
    if all_tokens:
        result["all"] = cost / all_tokens * rate
    return result


def irr(capital: float, cash: float, years: float, residual: float) -> float | None:
    """The rate at which `cash` a year and the residual at the end are worth `capital` today.

    None where they never are. By bisection: the present value falls with the rate.
    """
    if cash * years + residual <= 0:
        return None

    def present_value(rate: float) -> float:
        discount = float((1 + rate) ** -years)
        annuity = years if abs(rate) < 1e-12 else (1 - discount) / rate
        return cash * annuity + residual * discount - capital

    low, high = -0.99, 1.0
    while present_value(high) > 0 and high < 1e6:
        high *= 2
    if present_value(low) < 0 or present_value(high) > 0:
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if present_value(middle) > 0 else (low, middle)
    return (low + high) / 2


def peak_to_mean(load: Sequence[float]) -> float:
    """Of a daily curve of relative loads."""
    mean = sum(load) / len(load)
    if mean <= 0:
        raise ScenarioError("traffic.load must have a value above 0")
    return max(load) / mean
