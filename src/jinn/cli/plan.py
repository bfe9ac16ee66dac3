"""`jinn plan`: what serving or training a model takes, what it costs, and what it earns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from jinn.plan.plans import ServePlan

app = typer.Typer(help="Plan capacity, cost and margin.", no_args_is_help=True, rich_markup_mode=None)

ScenarioArgument = Annotated[
    Path | None,
    typer.Argument(metavar="SCENARIO", help="A TOML file; options go over it.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Any field of a scenario: cost.rent='2 USD/h'.",
        show_default=False,
    ),
]


def _text(help_text: str, metavar: str = "TEXT") -> Any:
    return typer.Option(help=help_text, metavar=metavar, show_default=False)


@app.command()
def serve(
    scenario: ScenarioArgument = None,
    model: Annotated[str | None, _text("A shape's name, a config.json, a folder or a GGUF file.")] = None,
    chip: Annotated[list[str] | None, _text("A chip of `jinn plan chips`; several are compared.")] = None,
    precision: Annotated[str | None, _text("Of weights: bf16, fp8, int8, int4.")] = None,
    engine: Annotated[str | None, _text("Whose efficiencies count: vllm, sglang, jinn…")] = None,
    requests: Annotated[str | None, _text("Requests that arrive: '5 requests/s'.")] = None,
    users: Annotated[str | None, _text("Users, with --requests-per-user.")] = None,
    requests_per_user: Annotated[str | None, _text("'20 requests/day'.")] = None,
    input_tokens: Annotated[str | None, _text("Tokens of a prompt, in the mean.", "N")] = None,
    output_tokens: Annotated[str | None, _text("Tokens of an answer, in the mean.", "N")] = None,
    cached_share: Annotated[str | None, _text("Of prompts, that the prefix cache has: 0.5.")] = None,
    first_token: Annotated[str | None, _text("Longest time to the first token: '2 s'.")] = None,
    token: Annotated[str | None, _text("Longest time between tokens: '50 ms'.")] = None,
    pools: Annotated[str | None, _text("shared, separate (prefill and decode apart) or best.")] = None,
    tp: Annotated[int | None, _text("Fix the placement: tensor parallel.", "N")] = None,
    pp: Annotated[int | None, _text("Pipeline parallel.", "N")] = None,
    dp: Annotated[int | None, _text("Data parallel attention.", "N")] = None,
    ep: Annotated[int | None, _text("Expert parallel.", "N")] = None,
    num_seqs: Annotated[int | None, _text("Sequences of each rank.", "N")] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the cheapest way to serve a model."""
    from jinn.plan.plans import as_json as plan_json
    from jinn.plan.plans import plan_serving
    from jinn.plan.scenario import ServeScenario, read_scenario

    options: dict[str, Any] = {
        "model.name": model,
        "chip": chip or None,
        "model.precision": precision,
        "engine.name": engine,
        "traffic.requests": requests,
        "traffic.users": users,
        "traffic.requests_per_user": requests_per_user,
        "traffic.input_tokens": input_tokens,
        "traffic.output_tokens": output_tokens,
        "traffic.cached_share": cached_share,
        "targets.first_token": first_token,
        "targets.token": token,
        "engine.pools": pools,
        **{f"placement.{name}": size for name, size in
           (("tp", tp), ("pp", pp), ("dp", dp), ("ep", ep), ("num_seqs", num_seqs))},
        **_settings(settings),
    }  # fmt: skip
    if scenario is None:
        options = {**_quick_traffic(options), **{k: v for k, v in options.items() if v is not None}}
    plan = plan_serving(read_scenario(ServeScenario, scenario, options))
    result = plan_json(plan)
    print(json.dumps(result) if as_json else format_serving(plan))


def _quick_traffic(options: dict[str, Any]) -> dict[str, Any]:
    """What a plan without a scenario is for, where options do not say."""
    quick: dict[str, Any] = {"traffic.input_tokens": 1000, "traffic.output_tokens": 300}
    if options["traffic.users"] is None:
        quick["traffic.requests"] = 1
    return quick


def _settings(settings: Sequence[str] | None) -> dict[str, Any]:
    """Dotted fields of --set; a value is TOML where it can be, and text otherwise."""
    import tomllib

    found: dict[str, Any] = {}
    for setting in settings or ():
        name, sign, value = setting.partition("=")
        if not sign or not name:
            raise ValueError(f"--set must be FIELD=VALUE, not {setting!r}")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found


def format_serving(plan: ServePlan) -> str:
    """The plan for people."""
    from jinn.plan.economics import is_priced
    from jinn.plan.units import money

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
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join([*lines, *_other_lines(plan)])


def _speed_rows(plan: ServePlan) -> list[tuple[str, str]]:
    from jinn.plan.plans import as_json as plan_json
    from jinn.plan.units import duration, short

    reading, generating = plan.reading, plan.generating
    if plan.shape is None or reading is None or generating is None or plan.efficiency is None:
        return []
    speed = plan_json(plan)["speed"]
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
    from jinn.plan.units import duration

    outcome, rows = plan.outcome, []
    if outcome.break_even_utilization is not None:
        reaches = f"{outcome.break_even_utilization:.0%} of the chips' time sold"
        rows.append(("breaks even at", reaches))
    if outcome.payback is not None:
        rows.append(("paid back in", duration(outcome.payback)))
    if outcome.irr is not None:
        rows.append(("return", f"{outcome.irr:.0%} a year (IRR)"))
    return rows


def _other_lines(plan: ServePlan) -> list[str]:
    from jinn.plan.units import money

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


@app.command()
def chips(
    name: Annotated[
        str | None, typer.Argument(help="One chip, with the source of each fact.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List what is known of chips."""
    from jinn.plan.chips import catalogue, find_chip

    if name is not None:
        print(_format_chip(find_chip(name)) if not as_json else json.dumps(_chip_json(find_chip(name))))
        return
    if as_json:
        print(json.dumps([_chip_json(chip) for chip in catalogue().values()]))
        return
    print(_format_catalogue())


def _chip_json(chip: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {"name": chip.name, "facts": {name: asdict(fact) for name, fact in chip.facts.items()}}


def _format_chip(chip: Any) -> str:
    from jinn.plan.units import short

    lines = [chip.name]
    for name, fact in chip.facts.items():
        span = f" ({short(fact.low)} to {short(fact.high)})" if fact.low < fact.high else ""
        lines.append(f"  {name:<13} {short(fact.value):>8}{span}  [{fact.confidence}] {fact.source}")
    return "\n".join(lines)


def _format_catalogue() -> str:
    from jinn.plan.chips import catalogue

    columns = (("bf16", 1e12), ("fp8", 1e12), ("int8", 1e12), ("memory", 1e9), ("bandwidth", 1e9),
               ("scaleup", 1e9), ("power", 1.0), ("price", 1.0))  # fmt: skip
    heads = ("chip", "bf16 Tflop/s", "fp8", "int8", "GB", "GB/s", "link GB/s", "W", "USD")
    table: list[tuple[str, ...]] = [heads]
    for chip in catalogue().values():
        cells = (f"{chip.fact(name) / unit:,.0f}" if chip.has(name) else "-" for name, unit in columns)
        table.append((chip.name, *cells))
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in table
    )
