"""Plans in lines for people: names and values, as the terminal and the report show them."""

from __future__ import annotations

from jinn.plan.economics import YEAR, is_priced
from jinn.plan.market import Purchase, token_prices
from jinn.plan.placement import Choice
from jinn.plan.plans import Operation, ServePlan, as_json
from jinn.plan.training import TrainPlan
from jinn.plan.units import duration, money, short

Row = tuple[str, str]
REJECTIONS_SHOWN = 6


def serving_rows(plan: ServePlan) -> list[Row]:
    """Which chips, how fast, at what cost, with what return, and how sure."""
    rows = [("scenario", plan.scenario.name), ("chip", plan.chip.name)]
    return [*rows, *_speed_rows(plan), *_cost_rows(plan), *_return_rows(plan), *_band_rows(plan)]


def _speed_rows(plan: ServePlan) -> list[Row]:
    reading, generating, operation = plan.reading, plan.generating, plan.operation
    if plan.scenario.measured is not None:
        return [("speed", f"measured: {plan.scenario.measured.source}")]
    if plan.shape is None or reading is None or generating is None or plan.efficiency is None:
        return []
    speed = as_json(plan)["speed"]
    rows = [("model", f"{plan.shape.name} in {plan.shape.precision}, cache in {plan.shape.kv_dtype}")]
    if plan.shape.note:
        rows.append(("note", plan.shape.note))
    rows.append(("efficiencies", f"{plan.efficiency.provenance}: {plan.efficiency.source}"))
    rows += _instance_rows(plan.pools, reading, generating)
    percentile = f"p{100 * plan.scenario.targets.percentile:g}"
    rows += [
        ("prefill", f"{speed['prefill_tokens_per_second_per_chip']:,.0f} tokens/s a chip"),
        ("decode", f"{speed['decode_tokens_per_second_per_chip']:,.0f} tokens/s a chip"),
        (f"first token, {percentile}", f"{duration(speed['first_token_seconds'])} at full load"),
        ("between tokens", f"{duration(speed['token_seconds'])} at full load"),
    ]
    return [*rows, *_operation_rows(operation)] if operation else rows


def _instance_rows(pools: str, reading: Choice, generating: Choice) -> list[Row]:
    choices = {"instance": reading} if pools == "shared" else {"reads": reading, "generates": generating}
    rows = []
    for name, choice in choices.items():
        seqs = f", {choice.num_seqs:g} sequences a rank" if choice.num_seqs else ""
        need = short(sum(choice.memory.values()))
        placement = f"{choice.instance.placement} ({choice.chips} chips)"
        rows.append((name, f"{placement}{seqs}, {need}B of memory a chip"))
    return rows


def _operation_rows(operation: Operation) -> list[Row]:
    wait, played = operation.first_token, operation.simulated.first_token
    if wait is None:
        return []
    formula = f"mean {duration(wait.mean)}, p95 {duration(wait.percentile(0.95))}"
    mean, late = sum(played) / len(played), operation.simulated.percentile(played, 0.95)
    return [("first token at peak", f"{formula}; simulated mean {duration(mean)}, p95 {duration(late)}")]


def _cost_rows(plan: ServePlan) -> list[Row]:
    outcome, currency = plan.outcome, plan.scenario.currency
    fleet = outcome.fleet
    rows = [("chips", f"{fleet.chips:,.0f}, {fleet.utilization:.0%} used in the mean")]
    if plan.shape is None:
        rows.insert(0, ("nodes", f"{fleet.mean_instances:.1f} in the mean"))
    if not is_priced(plan.case):
        rows.append(("cost", "unknown: the catalogue has no rent and no price of this chip; set cost.rent"))
    rows += [(f"cost, {name}", f"{money(part, currency)}/year") for name, part in outcome.cost_parts.items()]
    if outcome.cost:
        rows.append(("cost", f"{money(outcome.cost / 365, currency)}/day"))
        for kind, cost in outcome.cost_per_million.items():
            tokens = "tokens" if kind == "all" else f"{kind} tokens"
            rows.append((f"cost of 1M {tokens}", money(cost, currency)))
    if outcome.capital:
        rows.append(("capital", money(outcome.capital, currency)))
    return rows


def _return_rows(plan: ServePlan) -> list[Row]:
    outcome, currency = plan.outcome, plan.scenario.currency
    rows = []
    if outcome.gross_margin is not None and outcome.markup is not None:
        rows.append(("revenue", f"{money(outcome.revenue / 365, currency)}/day"))
        rows.append(("gross margin", f"{outcome.gross_margin:.1%} (markup {outcome.markup:.1%})"))
    if outcome.break_even_utilization is not None:
        rows.append(("breaks even at", f"{outcome.break_even_utilization:.0%} of the chips' time sold"))
    if outcome.payback is not None:
        rows.append(("paid back in", duration(outcome.payback)))
    if outcome.irr is not None:
        rows.append(("return", f"{outcome.irr:.0%} a year (IRR)"))
    return rows


def _band_rows(plan: ServePlan) -> list[Row]:
    if not plan.outcome.cost:
        return []
    rows = []
    for name, band in (plan.bands or {}).items():
        if band.p50 is not None:
            low, high = ("never" if end is None else f"{end:,.3g}" for end in (band.p10, band.p90))
            rows.append((name.replace("_", " "), f"{low} to {high} (10% to 90%)"))
    return rows


def other_lines(plan: ServePlan) -> list[str]:
    """Plans that would do too, and why some would not."""
    currency = plan.scenario.currency
    lines = [
        f"also possible: {other.chip.name}, {other.pools} pools: {other.outcome.fleet.chips:,.0f} chips, "
        f"{money(other.outcome.cost / 365, currency)}/day"
        for other in plan.others
    ]
    shown = plan.rejected[:: max(1, len(plan.rejected) // REJECTIONS_SHOWN)][:REJECTIONS_SHOWN]
    lines += [f"rejected: {chip}, {placement}: {reason}" for chip, placement, reason in shown]
    return lines


def budget_rows(found: Purchase) -> list[Row]:
    """What a budget buys, for people."""
    plan, budget = found.plan, found.scenario.budget
    currency = plan.scenario.currency
    rows = [
        ("budget", f"{money(budget.amount, currency)} over {budget.years:g} years"),
        ("serves", f"{plan.shape.name if plan.shape else 'as measured'} on {plan.chip.name}"),
        ("chips", f"{found.chips:,.0f}, {found.chips_per_year:,.0f} a year, {found.watts / 1e6:,.0f} MW"),
        ("tokens", f"{short(found.input_rate)} in and {short(found.output_rate)} out per second"),
        ("running cost", f"{money(found.operating, currency)}/year"),
        ("cost of 1M tokens", money(found.cost_per_million, currency)),
    ]
    if found.tokens_to_break_even is not None and found.break_even_utilization is not None:
        life = duration(plan.case.cost.depreciation)
        rows.append(("breaks even at", f"{short(found.tokens_to_break_even)} tokens sold, "
                     f"{found.break_even_utilization:.0%} of the chips' time in {life}"))  # fmt: skip
    return rows


def training_rows(plan: TrainPlan) -> list[Row]:
    """The run for people."""
    currency, parallel = plan.scenario.currency, plan.scenario.parallel
    split = f"TP{parallel.tp} PP{parallel.pp} CP{parallel.cp} EP{parallel.ep} DP{parallel.dp}"
    need = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in plan.memory.items())
    rows = [
        ("model", f"{plan.shape.name} in {plan.shape.precision}"),
        ("chips", f"{parallel.chips:,} {plan.chip.name}, {split}"),
        ("efficiency", f"{plan.efficiency.provenance}: {plan.efficiency.source}"),
        (
            "speed",
            f"{plan.flops_per_chip / 1e12:.0f} Tflop/s a chip, {plan.bubble:.1%} of it lost to the bubble",
        ),
        ("step", f"{duration(plan.step_seconds)}, {plan.num_steps:,.0f} of them"),
        ("goodput", f"{plan.goodput:.1%}, a checkpoint every {duration(plan.interval)}"),
        ("time", f"{duration(plan.seconds)}: {plan.chip_hours:,.0f} chip hours"),
        ("memory, GB a chip", need),
    ]
    if plan.energy is not None:
        rows.append(("energy", f"{plan.energy / 3.6e9:,.0f} MWh"))
    if plan.cost is not None:
        rows.append(("cost", f"{money(plan.cost, currency)} ({plan.cost_of})"))
    if plan.seconds > 2 * YEAR:
        rows.append(("warning", "longer than two years: add chips"))
    return rows


def price_lines() -> list[str]:
    """List prices per million tokens."""
    lines = ["List prices per million tokens: input, cached, output"]
    for price in token_prices():
        cached = "-" if price.cached_input is None else f"{price.cached_input:g}"
        amounts = f"{price.input:g} {cached} {price.output:g} {price.currency}"
        lines.append(f"{price.provider:<22}{price.model:<30}{price.tier:<28}{amounts}")
    return lines
