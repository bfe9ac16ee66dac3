"""What a plan's money hangs on: a tornado of one input at a time, and a Monte Carlo band of all at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from jinn.plan.chips import Chip
from jinn.plan.economics import Case, Outcome, evaluate
from jinn.plan.tables import ScenarioError, choice, quantity


def _scaled_cost(name: str) -> Callable[[Case, float], Case]:
    return lambda case, factor: replace(
        case, cost=replace(case.cost, **{name: getattr(case.cost, name) * factor})
    )


def _scaled(name: str) -> Callable[[Case, float], Case]:
    def scaled(case: Case, factor: float) -> Case:
        value = getattr(case, name)
        return case if value is None else replace(case, **{name: value * factor})

    return scaled


INPUTS: Mapping[str, Callable[[Case, float], Case]] = {
    "speed": _scaled("speed_factor"),
    "demand": _scaled("demand_factor"),
    "prices": _scaled("price_factor"),
    "chip price": _scaled("chip_price"),
    "rent": _scaled("chip_rent"),
    "electricity": _scaled_cost("electricity"),
    "depreciation": _scaled_cost("depreciation"),
    "people": _scaled_cost("people"),
    "network price": _scaled_cost("network_price"),
    "cached share": lambda case, factor: replace(case, cached_share=min(0.999, case.cached_share * factor)),
}
"""What may be uncertain, by the name that a scenario uses: each scales one input of a case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """[[uncertain]]: an input is between `low` and `high` times what the plan takes; most likely 1."""

    input: str = choice(tuple(INPUTS))
    low: float = quantity("1", positive=True, high=1.0)
    high: float = quantity("1", low=1.0)

    def __post_init__(self) -> None:
        if self.low == self.high:
            raise ScenarioError("low and high are the same")


SPEED_RANGES = {"measured": (0.95, 1.05), "calibrated": (0.85, 1.15), "assumed": (0.65, 1.35)}
"""By the provenance of efficiencies: what docs/plan.md's validation promises of each."""


def default_ranges(case: Case, chip: Chip | None, provenance: str) -> tuple[Range, ...]:
    """Where a scenario says nothing: the catalogue's own ranges of prices, and round figures for the rest."""
    low, high = SPEED_RANGES[provenance]
    ranges = [Range(input="speed", low=low, high=high), Range(input="demand", low=0.7, high=1.3)]
    if case.prices is not None:
        ranges.append(Range(input="prices", low=0.7, high=1.1))
    if case.cost.mode == "rent":
        ranges.append(Range(input="rent", low=0.75, high=1.5))
    else:
        price = chip.facts.get("price") if chip else None
        known = price is not None and price.low < price.value < price.high
        low, high = (price.low / price.value, price.high / price.value) if known and price else (0.85, 1.25)
        ranges.append(Range(input="chip price", low=low, high=high))
        ranges.append(Range(input="electricity", low=0.7, high=1.5))
        ranges.append(Range(input="depreciation", low=0.8, high=1.2))
    if case.cached_share > 0:
        ranges.append(Range(input="cached share", low=0.7, high=1.2))
    return tuple(ranges)


@dataclass(frozen=True, slots=True)
class Swing:
    """A figure where one input is at its low and at its high end."""

    input: str
    low_factor: float
    high_factor: float
    at_low: float
    at_high: float

    @property
    def size(self) -> float:
        return abs(self.at_high - self.at_low)


def tornado(case: Case, ranges: Sequence[Range], figure: Callable[[Outcome], float]) -> tuple[Swing, ...]:
    """The swing of a figure with each input, the widest first."""
    swings = [
        Swing(
            r.input,
            r.low,
            r.high,
            figure(evaluate(INPUTS[r.input](case, r.low))),
            figure(evaluate(INPUTS[r.input](case, r.high))),
        )
        for r in ranges
    ]
    return tuple(sorted(swings, key=lambda swing: -swing.size))


@dataclass(frozen=True, slots=True)
class Band:
    """Percentiles of a figure; None where some draws have none (a fleet that never pays for itself)."""

    p10: float | None
    p50: float | None
    p90: float | None


def monte_carlo(
    case: Case,
    ranges: Sequence[Range],
    figures: Mapping[str, Callable[[Outcome], float | None]],
    num_draws: int = 1000,
    seed: int = 0,
) -> dict[str, Band]:
    """Draws all inputs at once, each from the triangle of its range; the same seed gives the same band."""
    rng = random.Random(seed)  # noqa: S311
    samples: dict[str, list[float]] = {name: [] for name in figures}
    for _ in range(num_draws):
        drawn = case
        for r in ranges:
            drawn = INPUTS[r.input](drawn, rng.triangular(r.low, r.high, 1.0))
        outcome = evaluate(drawn)
        for name, figure in figures.items():
            value = figure(outcome)
            if value is not None:
                samples[name].append(value)
    return {name: _band(sorted(values), num_draws) for name, values in samples.items()}


def _band(values: Sequence[float], num_draws: int) -> Band:
    """Draws without a value count as beyond the highest."""

    def at(share: float) -> float | None:
        index = int(share * num_draws)
        return values[index] if index < len(values) else None

    return Band(at(0.1), at(0.5), at(0.9))
