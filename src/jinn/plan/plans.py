"""From a scenario to a plan: which chips, how many, how split, how fast, at what cost, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from jinn.plan.chips import Chip, MissingFactError, find_chip
from jinn.plan.economics import DAY, YEAR, Case, Lengths, Outcome, evaluate, is_priced, settled_mode
from jinn.plan.efficiency import Efficiency, find_efficiency
from jinn.plan.placement import Choice, Found, Search, Targets, best_separate, best_shared
from jinn.plan.queueing import Simulated, Wait, first_token, simulate
from jinn.plan.scenario import MeasuredTable, ModelTable, PlacementTable, ServeScenario
from jinn.plan.serving import Drafting, Workload, shared_load
from jinn.plan.shapes import Shape, shape_of
from jinn.plan.speed import Machine, Placement
from jinn.plan.tables import ScenarioError
from jinn.plan.uncertainty import Band, Range, Swing, default_ranges, monte_carlo, tornado

NUM_DRAWS = 1000
NUM_PLAYED = 400  # requests of a simulation


class NoPlanError(ScenarioError):
    """Nothing that was tried meets the targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A rank at the peak of the day: the closed form's times beside those of a simulation."""

    requests_per_second_per_rank: float
    ranks: int
    num_seqs: float
    token_seconds: float
    first_token: Wait | None
    simulated: Simulated


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePlan:
    """The best plan of a scenario, and what it was chosen from.

    `reading` and `generating` are the same choice where pools are shared, and None where rates were measured.
    """

    scenario: ServeScenario
    shape: Shape | None
    chip: Chip
    efficiency: Efficiency | None
    pools: str
    reading: Choice | None
    generating: Choice | None
    case: Case
    outcome: Outcome
    others: tuple[ServePlan, ...]  # with other chips, or pools
    rejected: tuple[tuple[str, str, str], ...]  # chip, placement, reason
    num_tried: int
    ranges: tuple[Range, ...] = ()
    swings: tuple[Swing, ...] = ()
    bands: Mapping[str, Band] | None = None
    operation: Operation | None = None

    @property
    def rank(self) -> tuple[bool, float, float]:
        """What plans are compared by: cost, those without a price last and by chips."""
        return not is_priced(self.case), self.outcome.cost, self.outcome.fleet.chips


def plan_serving(scenario: ServeScenario) -> ServePlan:
    """The cheapest plan. Raises NoPlanError with reasons where there is none, ScenarioError, ConfigError."""
    if scenario.measured is not None:
        return _with_uncertainty(_measured_plan(scenario, scenario.measured))
    if scenario.model is None:
        raise ScenarioError("model is missing")
    own = {table.name: table.chip() for table in scenario.chips}
    found: list[ServePlan] = []
    rejected: list[tuple[str, str, str]] = []
    for name in scenario.chip:
        plans, reasons = _plans_of(scenario, scenario.model, find_chip(name, own))
        found += plans
        rejected += reasons
    if not found:
        raise NoPlanError(_no_plan(rejected))
    found.sort(key=lambda plan: plan.rank)
    best = _assembled(found[0], tuple(found[1:]), tuple(rejected))
    return _with_uncertainty(_with_operation(best))


def _no_plan(rejected: list[tuple[str, str, str]]) -> str:
    by_chip = {chip: (placement, reason) for chip, placement, reason in reversed(rejected)}
    reasons = "; ".join(f"{chip}, {placement}: {reason}" for chip, (placement, reason) in by_chip.items())
    return f"no plan meets the targets ({len(rejected)} were tried): {reasons}"


def _measured_plan(scenario: ServeScenario, measured: MeasuredTable) -> ServePlan:
    chip = find_chip(scenario.chip[0], {table.name: table.chip() for table in scenario.chips})
    cached = scenario.traffic.cached
    new_share = 1 - cached if measured.counts_cached else 1.0
    case = _case(
        scenario,
        chip,
        (measured.input_rate * new_share, measured.chips),
        (measured.output_rate, measured.chips),
    )
    return ServePlan(
        scenario=scenario,
        shape=None,
        chip=chip,
        efficiency=None,
        pools="measured",
        reading=None,
        generating=None,
        case=case,
        outcome=evaluate(case),
        others=(),
        rejected=(),
        num_tried=1,
    )


def _case(
    scenario: ServeScenario,
    chip: Chip,
    reading: tuple[float, int],
    generating: tuple[float, int],
    is_shared: bool = False,
) -> Case:
    """The plain numbers of a scenario; each pool is (tokens per second of an instance, its chips)."""
    traffic, cost = scenario.traffic, scenario.cost
    input_rate, output_rate = traffic.rates

    def priced(name: str, given: float | None, factor: float) -> float | None:
        if given is not None:
            return given
        return chip.fact(name) * factor if chip.has(name) else None

    price = priced("price", cost.chip_price, scenario.dollar)
    rent = priced("rent", cost.rent, scenario.dollar)
    return Case(
        input_rate=input_rate,
        cached_share=traffic.cached,
        output_rate=output_rate,
        input_capacity=reading[0],
        output_capacity=generating[0],
        input_chips=reading[1],
        output_chips=generating[1],
        is_shared=is_shared,
        peak_to_mean=traffic.peak,
        load_target=1.0 if scenario.measured else scenario.targets.load,
        chip_price=price,
        chip_power=priced("power", cost.chip_power, 1.0),
        chip_rent=rent,
        cost=settled_mode(cost, rent, price),
        prices=scenario.prices,
        lengths=Lengths(mean=traffic.input_tokens or 1.0, variation=traffic.variation),
    )


def _plans_of(
    scenario: ServeScenario, model: ModelTable, chip: Chip
) -> tuple[list[ServePlan], list[tuple[str, str, str]]]:
    """The best plan of a chip for each way of pooling, and why placements were rejected."""
    try:
        search = _search(scenario, model, chip)
        searches = _searches(scenario, search)
        plans = [
            _plan(scenario, search, pools, reading.best, generating.best)
            for pools, reading, generating in searches
            if reading.best is not None and generating.best is not None
        ]
    except MissingFactError as error:
        return [], [(chip.name, "any placement", str(error).partition(": ")[2])]
    rejected = [
        (chip.name, str(rejection.placement), rejection.reason)
        for pools, *found in searches
        for rejection in {r.placement: r for each in found for r in each.rejected}.values()
    ]
    return plans, rejected


def _searches(scenario: ServeScenario, search: Search) -> list[tuple[str, Found, Found]]:
    wanted = scenario.engine.pools
    fixed, fixed_reading = _fixed(scenario.placement), _fixed(scenario.prefill_placement)
    results = []
    if wanted == "shared" or (wanted == "best" and fixed_reading is None):
        found = best_shared(search, fixed)
        results.append(("shared", found, found))
    if wanted == "separate" or (wanted == "best" and (fixed is None) == (fixed_reading is None)):
        results.append(("separate", *best_separate(search, fixed_reading, fixed)))
    return results


def _fixed(given: PlacementTable | None) -> Placement | None:
    return None if given is None else Placement(given.tp, given.pp, given.dp, given.ep)


def _search(scenario: ServeScenario, model: ModelTable, chip: Chip) -> Search:
    traffic, engine, targets = scenario.traffic, scenario.engine, scenario.targets
    shape = shape_of(model.name, model.precision, model.kv)
    needed = (traffic.input_tokens or 1.0) + (traffic.output_tokens or 0.0)
    if needed > shape.max_position_embeddings:
        raise ScenarioError(
            f"traffic.input_tokens and output_tokens are {needed:g} together, more than the model's "
            f"{shape.max_position_embeddings}"
        )
    machine = Machine(
        chip,
        find_efficiency(chip.name, engine.name, shape.architecture, shape.precision, scenario.efficiencies),
    )
    fixed = scenario.placement.num_seqs if scenario.placement else None
    return Search(
        shape=shape,
        machine=machine,
        workload=Workload(
            traffic.input_tokens or 1.0, traffic.output_tokens or 1.0, traffic.cached, traffic.variation
        ),
        targets=Targets(
            first_token=targets.first_token,
            token=targets.token,
            percentile=targets.percentile,
            load=targets.load,
        ),
        chunk=engine.chunk,
        max_num_seqs=fixed or engine.max_num_seqs,
        max_chips=engine.max_chips,
        drafting=Drafting(engine.drafts, engine.acceptance),
        request_rate=(traffic.request_rate or 0.0) * traffic.peak,
    )


def _plan(
    scenario: ServeScenario, search: Search, pools: str, reading: Choice, generating: Choice
) -> ServePlan:
    case = _case(
        scenario,
        search.machine.chip,
        (reading.input_rate, reading.chips),
        (generating.output_rate, generating.chips),
        is_shared=reading is generating,
    )
    return ServePlan(
        scenario=scenario,
        shape=search.shape,
        chip=search.machine.chip,
        efficiency=search.machine.efficiency,
        pools=pools,
        reading=reading,
        generating=generating,
        case=case,
        outcome=evaluate(case),
        others=(),
        rejected=(),
        num_tried=0,
    )


def _assembled(
    best: ServePlan, others: tuple[ServePlan, ...], rejected: tuple[tuple[str, str, str], ...]
) -> ServePlan:
    return replace(best, others=others, rejected=rejected, num_tried=len(rejected) + len(others) + 1)


def workload_of(scenario: ServeScenario) -> Workload:
    traffic = scenario.traffic
    return Workload(
        traffic.input_tokens or 1.0, traffic.output_tokens or 1.0, traffic.cached, traffic.variation
    )


def _with_operation(plan: ServePlan) -> ServePlan:
    """What requests meet at the peak of the day, by the closed form and played out on one rank."""
    reading, generating = plan.reading, plan.generating
    if reading is None or generating is None:
        return plan
    workload, fleet = workload_of(plan.scenario), plan.outcome.fleet
    peak = (plan.scenario.traffic.request_rate or 0.0) * plan.scenario.traffic.peak
    is_shared = plan.pools == "shared"
    readers = fleet.input_instances + (fleet.output_instances if is_shared else 0)
    ranks = max(1, round(readers * reading.instance.placement.dp))
    num_seqs, token, rate = 0.0, 0.0, peak / ranks
    if is_shared:
        load = shared_load(reading.instance, workload, rate)
        num_seqs, token = (load.num_seqs, load.token_seconds) if load else (0.0, 0.0)
    elif generating.load is not None:
        token = generating.load.token_seconds
    wait = first_token(reading.instance, workload, peak, num_seqs, ranks)
    alone = workload if is_shared else replace(workload, output_tokens=1.0)
    played = simulate(reading.instance, alone, rate, max(1, int(reading.num_seqs) or 1024), NUM_PLAYED)
    return replace(
        plan,
        operation=Operation(
            requests_per_second_per_rank=rate,
            ranks=ranks,
            num_seqs=num_seqs,
            token_seconds=token,
            first_token=wait,
            simulated=played,
        ),
    )


FIGURES = {
    "cost_per_million_tokens": lambda outcome: outcome.cost_per_million.get("all"),
    "cost_per_year": lambda outcome: outcome.cost,
    "gross_margin": lambda outcome: outcome.gross_margin,
    "payback_years": lambda outcome: None if outcome.payback is None else outcome.payback / YEAR,
}


def _with_uncertainty(plan: ServePlan) -> ServePlan:
    provenance = plan.efficiency.provenance if plan.efficiency else "measured"
    ranges = plan.scenario.uncertain or default_ranges(plan.case, plan.chip, provenance)
    swings = tornado(plan.case, ranges, lambda outcome: outcome.cost_per_million.get("all", 0.0))
    if plan.outcome.gross_margin is not None:
        swings = tornado(plan.case, ranges, lambda outcome: outcome.gross_margin or 0.0)
    bands = monte_carlo(plan.case, ranges, FIGURES, NUM_DRAWS)
    return replace(plan, ranges=tuple(ranges), swings=swings, bands=bands)


def as_json(plan: ServePlan) -> dict[str, Any]:
    """All of a plan, in seconds, bytes, tokens and the scenario's currency. Raises where not finite."""
    result: dict[str, Any] = {
        "scenario": plan.scenario.name,
        "currency": plan.scenario.currency,
        "chip": plan.chip.name,
        "pools": plan.pools,
        **_economics_json(plan),
    }
    if plan.shape is not None:
        result["model"] = _model_json(plan.shape)
    if plan.efficiency is not None:
        result["efficiency"] = asdict(plan.efficiency)
    if plan.reading is not None and plan.generating is not None:
        result["placement"] = {
            "reading": _choice_json(plan.reading),
            "generating": _choice_json(plan.generating),
        }
        result["speed"] = _speed_json(plan, plan.reading, plan.generating)
    result["others"] = [_summary_json(other) for other in plan.others]
    result["num_tried"] = plan.num_tried
    result["rejected"] = [
        {"chip": chip, "placement": placement, "reason": reason} for chip, placement, reason in plan.rejected
    ]
    check_finite(result)
    return result


def _model_json(shape: Shape) -> dict[str, Any]:
    return {
        "name": shape.name,
        "family": shape.family,
        "architecture": shape.architecture,
        "precision": shape.precision,
        "kv": shape.kv_dtype,
        "total_parameters": shape.work.total_parameters,
        "active_parameters": shape.work.active_parameters,
        "weight_bytes": shape.work.weight_bytes,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "state_bytes_per_sequence": shape.state_bytes_per_sequence,
        "note": shape.note,
    }


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {
        **asdict(choice.instance.placement),
        "chips": choice.chips,
        "num_seqs_per_rank": choice.num_seqs,
        "memory_per_chip": choice.memory,
    }


def _speed_json(plan: ServePlan, reading: Choice, generating: Choice) -> dict[str, Any]:
    workload = workload_of(plan.scenario)
    context = workload.decode_context
    decode_rate = generating.instance.decode_rate(generating.num_seqs, context)
    return {
        "prefill_tokens_per_second_per_chip": reading.instance.prefill_rate(workload) / reading.chips,
        "decode_tokens_per_second_per_chip": decode_rate / generating.chips,
        "first_token_percentile": plan.scenario.targets.percentile,
        "first_token_seconds": reading.first_token,
        "token_seconds": generating.load.token_seconds if generating.load else None,
        "prefill_step_seconds": dict(reading.instance.prefill_times(workload)),
        "decode_step_seconds": generating.instance.decode_times(generating.num_seqs, context),
        "at_peak": _operation_json(plan.operation) if plan.operation else None,
    }


def _operation_json(operation: Operation) -> dict[str, Any]:
    wait, played = operation.first_token, operation.simulated
    return {
        "requests_per_second_per_rank": operation.requests_per_second_per_rank,
        "ranks": operation.ranks,
        "num_seqs": operation.num_seqs,
        "token_seconds": operation.token_seconds,
        "first_token_seconds": None
        if wait is None
        else {"mean": wait.mean, **{f"p{p}": wait.percentile(p / 100) for p in (50, 90, 95, 99)}},
        "simulated": {
            "first_token_seconds": {
                "mean": sum(played.first_token) / len(played.first_token),
                **{f"p{p}": played.percentile(played.first_token, p / 100) for p in (50, 90, 95, 99)},
            },
            "token_seconds": sum(played.token) / len(played.token),
            "num_seqs": played.mean_num_seqs,
        },
    }


def _economics_json(plan: ServePlan) -> dict[str, Any]:
    outcome, fleet = plan.outcome, plan.outcome.fleet
    per_day = DAY / YEAR
    return {
        "is_priced": is_priced(plan.case),
        "cost_mode": plan.case.cost.mode,
        "nodes": fleet.mean_instances,
        "fleet": asdict(fleet),
        "chips": fleet.chips,
        "cost_per_day": outcome.cost * per_day,
        "cost_per_year": outcome.cost,
        "cost_parts_per_year": dict(outcome.cost_parts),
        "capital": outcome.capital,
        "cost_per_million_tokens": dict(outcome.cost_per_million),
        "revenue_per_day": outcome.revenue * per_day,
        "revenue_per_year": outcome.revenue,
        "revenue_parts_per_year": dict(outcome.revenue_parts),
        "markup": outcome.markup,
        "gross_margin": outcome.gross_margin,
        "payback_years": None if outcome.payback is None else outcome.payback / YEAR,
        "irr": outcome.irr,
        "utilization": fleet.utilization,
        "break_even_utilization": outcome.break_even_utilization,
        "bands": {name: asdict(band) for name, band in (plan.bands or {}).items()},
        "tornado": [asdict(swing) for swing in plan.swings],
    }


def _summary_json(plan: ServePlan) -> dict[str, Any]:
    return {
        "chip": plan.chip.name,
        "pools": plan.pools,
        "placement": {
            "reading": str(plan.reading.instance.placement) if plan.reading else "",
            "generating": str(plan.generating.instance.placement) if plan.generating else "",
        },
        "chips": plan.outcome.fleet.chips,
        "cost_per_year": plan.outcome.cost,
        "cost_per_million_tokens": dict(plan.outcome.cost_per_million),
        "gross_margin": plan.outcome.gross_margin,
    }


def check_finite(value: object, where: str = "result") -> None:
    """Raise ValueError naming the first number that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}")
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_finite(item, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_finite(item, f"{where}[{index}]")
