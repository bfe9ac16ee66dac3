"""Plans in lines for people: names and values, as the terminal and the report show them."""

from __future__ import annotations

from jinn.plan.economics import YEAR, is_priced
from jinn.plan.market import Purchase, token_prices
from jinn.plan.plans import ServePlan, as_json
from jinn.plan.training import TrainPlan
from jinn.plan.units import duration, money, short


def serving_rows(plan: ServePlan) -> list[tuple[str, str]]:
    """The plan for people."""

    scenario, outcome = plan.scenario, plan.outcome
    currency = scenario.currency
    rows: list[tuple[str, str]] = [("scenario", scenario.name), ("chip", plan.chip.name)]
    rows += _speed_rows(plan)
    fleet = outcome.fleet
    if plan.shape is None:
        rows.append(("nodes", f"{fleet.mean_instances:.1f} in the mean"))
    rows.append(("chips", f"{fleet.chips:,.0f}, {fleet.utilization:.0%} used in the mean"))
    if not is_priced(plan.case):
        rows.append(("cost", "unknown: the catalogue has no rent and no price of this chip; set cost.rent"))
    rows += [(f"cost, {name}", f"{money(part, currency)}/year") for name, part in outcome.cost_parts.items()]
    rows += (
        []
        if not outcome.cost
        else [
            ("cost", f"{money(outcome.cost / 365, currency)}/day"),
            *(
                (f"cost of 1M {name} tokens" if name != "all" else "cost of 1M tokens", money(cost, currency))
                for name, cost in outcome.cost_per_million.items()
            ),
        ]
    )
    if outcome.capital:
        rows.append(("capital", money(outcome.capital, currency)))
    if outcome.gross_margin is not None and outcome.markup is not None:
        rows.append(("revenue", f"{money(outcome.revenue / 365, currency)}/day"))
        rows.append(("gross margin", f"{outcome.gross_margin:.1%} (markup {outcome.markup:.1%})"))
    rows += _return_rows(plan)
    for name, band in (plan.bands or {}).items() if outcome.cost else ():
        if band.p50 is not None:
            low, high = (f"{value:,.3g}" if value is not None else "never" for value in (band.p10, band.p90))
            rows.append((name.replace("_", " "), f"{low} to {high} (10% to 90%)"))
    return rows


def _speed_rows(plan: ServePlan) -> list[tuple[str, str]]:

    reading, generating = plan.reading, plan.generating
    if plan.shape is None or reading is None or generating is None or plan.efficiency is None:
        return []
    speed = as_json(plan)["speed"]
    kind = plan.efficiency.provenance
    rows = [
        ("model", f"{plan.shape.name} in {plan.shape.precision}, cache in {plan.shape.kv_dtype}"),
        ("efficiencies", f"{kind}: {plan.efficiency.source}"),
    ]
    if plan.shape.note:
        rows.insert(1, ("note", plan.shape.note))
    pools = (
        [("instance", reading)] if plan.pools == "shared" else [("reads", reading), ("generates", generating)]
    )
    for name, choice in pools:
        need = short(sum(choice.memory.values()))
        seqs = f", {choice.num_seqs:g} sequences a rank" if choice.num_seqs else ""
        rows.append(
            (
                name,
                f"{choice.instance.placement} ({choice.chips} chips){seqs}, {need}B of memory a chip",
            )
        )
    rows.append(("prefill", f"{speed['prefill_tokens_per_second_per_chip']:,.0f} tokens/s a chip"))
    rows.append(("decode", f"{speed['decode_tokens_per_second_per_chip']:,.0f} tokens/s a chip"))
    peak = speed["at_peak"]
    share = f"p{100 * plan.scenario.targets.percentile:g}"
    rows.append((f"first token, {share}", f"{duration(speed['first_token_seconds'])} at full load"))
    if peak and peak["first_token_seconds"]:
        mean, played = peak["first_token_seconds"], peak["simulated"]["first_token_seconds"]
        rows.append(
            ("first token at peak", f"mean {duration(mean['mean'])}, p95 {duration(mean['p95'])}; "
             f"simulated mean {duration(played['mean'])}, p95 {duration(played['p95'])}")
        )  # fmt: skip
    rows.append(("between tokens", f"{duration(speed['token_seconds'])} at full load"))
    return rows


def _return_rows(plan: ServePlan) -> list[tuple[str, str]]:

    outcome, rows = plan.outcome, []
    if outcome.break_even_utilization is not None:
        reaches = f"{outcome.break_even_utilization:.0%} of the chips' time sold"
        rows.append(("breaks even at", reaches))
    if outcome.payback is not None:
        rows.append(("paid back in", duration(outcome.payback)))
    if outcome.irr is not None:
        rows.append(("return", f"{outcome.irr:.0%} a year (IRR)"))
    return rows


def other_lines(plan: ServePlan) -> list[str]:

    lines = [
        f"also possible: {other.chip.name}, {other.pools} pools: {other.outcome.fleet.chips:,.0f} chips, "
        f"{money(other.outcome.cost / 365, plan.scenario.currency)}/day"
        for other in plan.others
    ]
    first = {(chip, reason.split(" ")[-3:][0]): (chip, placement, reason)
             for chip, placement, reason in reversed(plan.rejected)}  # fmt: skip
    lines += [
        f"rejected: {chip}, {placement}: {reason}" for chip, placement, reason in list(first.values())[:6]
    ]
    return lines


def budget_rows(found: Purchase) -> list[tuple[str, str]]:
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


def training_rows(plan: TrainPlan) -> list[tuple[str, str]]:
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
