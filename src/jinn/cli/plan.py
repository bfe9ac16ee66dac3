"""`jinn plan`: what serving or training a model takes, what it costs, and what it earns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jinn.cli import here
from jinn.cli.options import aligned

app = typer.Typer(help="Plan capacity, cost and margin.", no_args_is_help=True, rich_markup_mode=None)
app.command("here")(here.here)

ScenarioArgument = Annotated[
    Path | None,
    typer.Argument(metavar="SCENARIO", help="A TOML file; options go over it.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ReportOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write an HTML page with charts.", show_default=False)
]
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
    report: ReportOption = None,
) -> None:
    """Find the cheapest way to serve a model."""
    from jinn.plan.plans import as_json as plan_json
    from jinn.plan.plans import plan_serving
    from jinn.plan.scenario import ServeScenario, read_scenario
    from jinn.plan.summaries import other_lines, serving_rows

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
    rows = serving_rows(plan)
    if report is not None:
        from jinn.plan.report import serving_page

        report.write_text(serving_page(plan, rows), encoding="utf-8")
    print(json.dumps(result) if as_json else "\n".join([_table(rows), *other_lines(plan)]))


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


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@app.command()
def train(
    scenario: ScenarioArgument = None,
    model: Annotated[str | None, _text("A shape's name, a config.json, a folder or a GGUF file.")] = None,
    chip: Annotated[str | None, _text("A chip of `jinn plan chips`.")] = None,
    precision: Annotated[str | None, _text("Of matrices: bf16 or fp8.")] = None,
    chips: Annotated[int | None, _text("How many.", "N")] = None,
    tokens: Annotated[str | None, _text("To train on: '15e12 tokens'.")] = None,
    sequence: Annotated[int | None, _text("Tokens of a sequence.", "N")] = None,
    batch: Annotated[str | None, _text("Tokens of a step: '4e6 tokens'.")] = None,
    tp: Annotated[int | None, _text("Tensor parallel.", "N")] = None,
    pp: Annotated[int | None, _text("Pipeline parallel.", "N")] = None,
    ep: Annotated[int | None, _text("Expert parallel.", "N")] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    report: ReportOption = None,
) -> None:
    """Say how long training takes, and what it costs."""
    from jinn.plan.scenario import read_scenario
    from jinn.plan.summaries import training_rows
    from jinn.plan.training import TrainScenario, plan_training
    from jinn.plan.training import as_json as plan_json

    options = {
        "model.name": model,
        "chip": chip,
        "model.precision": precision,
        "parallel.chips": chips,
        "run.tokens": tokens,
        "run.sequence": sequence,
        "run.batch": batch,
        "parallel.tp": tp,
        "parallel.pp": pp,
        "parallel.ep": ep,
        **_settings(settings),
    }
    plan = plan_training(read_scenario(TrainScenario, scenario, options))
    rows = training_rows(plan)
    if report is not None:
        from jinn.plan.report import training_page

        report.write_text(training_page(plan, rows), encoding="utf-8")
    print(json.dumps(plan_json(plan)) if as_json else _table(rows))


@app.command()
def market(
    scenario: ScenarioArgument = None,
    budget: Annotated[str | None, _text("Over a scenario's: '53e9 USD'.")] = None,
    years: Annotated[str | None, _text("That it is spent over: '3 years'.")] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
    report: ReportOption = None,
) -> None:
    """Show what the big buyers spend, what tokens sell for, and what a scenario's budget buys."""
    from jinn.plan.market import MarketScenario, bars, columns, purchase
    from jinn.plan.market import as_json as market_json
    from jinn.plan.scenario import read_scenario
    from jinn.plan.summaries import budget_rows, price_lines

    options = {"budget.amount": budget, "budget.years": years, **_settings(settings)}
    if scenario is None and any(value is not None for value in options.values()):
        raise ValueError("SCENARIO is missing: a budget buys chips for what [serve] describes")
    found = purchase(read_scenario(MarketScenario, scenario, options)) if scenario else None
    rows = budget_rows(found) if found else []
    if report is not None:
        from jinn.plan.report import market_page

        report.write_text(market_page(found, rows), encoding="utf-8")
    if as_json:
        print(json.dumps(market_json(found)))
        return
    years_shown, companies = columns()
    lines = [_table(rows), ""] if rows else []
    lines += [
        "Capital spending, billion USD by calendar year",
        *bars(companies, years_shown),
        "",
        *price_lines(),
    ]
    print("\n".join(lines))


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
    return "\n".join(aligned(row, widths) for row in table)
