"""A plan as one HTML page: tables, and charts by plotly, whose script it holds; it asks no host anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from jinn.plan.market import Purchase, columns, token_prices
from jinn.plan.placement import Choice
from jinn.plan.plans import ServePlan, workload_of
from jinn.plan.queueing import first_token
from jinn.plan.serving import shared_load
from jinn.plan.training import TrainPlan
from jinn.plan.units import money

Figure = dict[str, Any]
Rows = Sequence[tuple[str, str]]

# Nothing may be fetched: scripts and styles are the page's own, pictures are data.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_STYLE = """
body { font: 15px/1.5 sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top }
tr { border-bottom: 1px solid #e4e4e4 } td + td { font-variant-numeric: tabular-nums }
.chart { height: 24rem } p.note { color: #666 }
"""
_LAYOUT = {"margin": {"l": 70, "r": 60, "t": 20, "b": 50}, "template": "none", "font": {"size": 13}}


class Page:
    """Sections in order; `html` joins them."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._body: list[str] = [f"<h1>{escape(title)}</h1>"]
        self._figures: list[Figure] = []

    def heading(self, text: str) -> None:
        self._body.append(f"<h2>{escape(text)}</h2>")

    def note(self, text: str) -> None:
        self._body.append(f'<p class="note">{escape(text)}</p>')

    def table(self, rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> None:
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        lines = [f"<tr>{cells}</tr>"] if head else []
        lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        self._body.append(f"<table>{''.join(lines)}</table>")

    def chart(self, data: Sequence[Figure], **layout: Any) -> None:
        self._body.append(f'<div class="chart" id="chart{len(self._figures)}"></div>')
        self._figures.append({"data": list(data), "layout": {**_LAYOUT, **layout}})

    def html(self) -> str:
        """Raises ModuleNotFoundError where plotly is not installed."""
        return (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head><body>"
            f"{''.join(self._body)}<script>{_plotly_script()}</script><script>{self._draw()}</script></body></html>"
        )

    def _draw(self) -> str:
        figures = json.dumps(self._figures, allow_nan=False).replace("<", "\\u003c")
        return (
            f"{figures}.forEach((figure, index) => Plotly.newPlot('chart' + index, figure.data, "
            "figure.layout, {displayModeBar: false, responsive: true}));"
        )


def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--report needs plotly: pip install 'jinn[report]'") from None
    return str(get_plotlyjs())


def serving_page(plan: ServePlan, rows: Rows) -> str:
    """`rows` is what the terminal shows."""
    page = Page(plan.scenario.name)
    page.table(rows)
    if plan.shape is not None and plan.shape.note:
        page.note(plan.shape.note)
    _cost_charts(page, plan)
    if plan.reading is not None and plan.generating is not None:
        _speed_charts(page, plan, plan.reading, plan.generating)
    if plan.others:
        page.heading("Also possible")
        page.table([_other_row(other) for other in plan.others], ("chip", "pools", "chips", "cost a year"))
    if plan.rejected:
        page.heading("Why not otherwise")
        page.table(plan.rejected[:40], ("chip", "placement", "reason"))
    return page.html()


def _other_row(plan: ServePlan) -> tuple[str, str, str, str]:
    chips, cost = plan.outcome.fleet.chips, money(plan.outcome.cost, plan.scenario.currency)
    return plan.chip.name, plan.pools, f"{chips:,.0f}", cost


def _cost_charts(page: Page, plan: ServePlan) -> None:
    currency = plan.scenario.currency
    if plan.outcome.cost_parts:
        page.heading("Cost and revenue of a year")
        page.chart(
            [
                _stacked("cost", name, part) for name, part in plan.outcome.cost_parts.items()
            ] + [_stacked("revenue", name, part) for name, part in plan.outcome.revenue_parts.items()],
            barmode="stack", yaxis={"title": {"text": f"{currency} a year"}},
        )  # fmt: skip
    if plan.swings and plan.outcome.cost:
        figure = "gross margin" if plan.outcome.gross_margin is not None else f"{currency} per 1M tokens"
        page.heading(f"What {figure} hangs on")
        page.chart(_tornado(plan), barmode="overlay", xaxis={"title": {"text": figure}},
                   yaxis={"automargin": True})  # fmt: skip
    if plan.scenario.traffic.load:
        page.heading("The day")
        load = plan.scenario.traffic.load
        mean = sum(load) / len(load)
        hours = [24 * index / len(load) for index in range(len(load))]
        page.chart(
            [{"type": "scatter", "x": hours, "y": [value / mean for value in load], "line": {"shape": "hv"}}],
            xaxis={"title": {"text": "hour"}},
            yaxis={"title": {"text": "load over its mean"}, "rangemode": "tozero"},
        )  # fmt: skip


def _stacked(column: str, name: str, amount: float) -> Figure:
    return {"type": "bar", "x": [column], "y": [amount], "name": name}


def _tornado(plan: ServePlan) -> list[Figure]:
    """Bars from the plan's own figure to where each input takes it; the widest on top."""
    swings = plan.swings[::-1]
    own = plan.outcome.gross_margin
    if own is None:
        own = plan.outcome.cost_per_million.get("all", 0.0)
    names = [swing.input for swing in swings]
    ends = (("low", [s.at_low for s in swings], [s.low_factor for s in swings]),
            ("high", [s.at_high for s in swings], [s.high_factor for s in swings]))  # fmt: skip
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": f"input {end}",
            "y": names,
            "base": own,
            "x": [value - own for value in values],
            "text": [f"x{factor:g}" for factor in factors],
        }
        for end, values, factors in ends
    ]


def _speed_charts(page: Page, plan: ServePlan, reading: Choice, generating: Choice) -> None:
    workload = workload_of(plan.scenario)
    context, instance = workload.decode_context, generating.instance
    most = max(2, int(generating.num_seqs * 2))
    sizes = sorted({max(1, round(most ** (step / 24))) for step in range(25)})
    page.heading("Generating: sequences of a rank")
    rates = [instance.decode_rate(size, context) / generating.chips for size in sizes]
    times = [instance.token_seconds(size, context) * 1e3 for size in sizes]
    page.chart(
        [
            {"type": "scatter", "x": sizes, "y": rates, "name": "tokens/s a chip"},
            {"type": "scatter", "x": sizes, "y": times, "name": "ms between tokens", "yaxis": "y2"},
        ],
        xaxis={"title": {"text": "sequences of a rank"}, "type": "log"},
        yaxis={"title": {"text": "tokens/s a chip"}, "rangemode": "tozero"},
        yaxis2={"title": {"text": "ms"}, "overlaying": "y", "side": "right", "rangemode": "tozero"},
    )
    page.heading("Time to the first token")
    page.chart(_waits(plan, reading), xaxis={"title": {"text": "share of capacity"}},
               yaxis={"title": {"text": "seconds"}, "rangemode": "tozero"})  # fmt: skip
    page.heading("Where a step's time goes")
    kinds = {"prefill": reading.instance.prefill_times(workload),
             "decode": instance.decode_times(generating.num_seqs, context)}  # fmt: skip
    page.chart(_shares(kinds), barmode="stack", yaxis={"title": {"text": "share of the step"}})


def _waits(plan: ServePlan, reading: Choice) -> list[Figure]:
    """Mean and percentiles by load, of one rank with a queue of its own."""
    workload, instance = workload_of(plan.scenario), reading.instance
    full = instance.prefill_rate(workload) / workload.new_tokens / instance.placement.dp
    if reading.load is not None:
        full = reading.load.request_rate
    curves: dict[str, tuple[list[float], list[float]]] = {"mean": ([], []), "p95": ([], [])}
    for step in range(1, 20):
        rate = full * step / 20
        load = shared_load(instance, workload, rate) if reading.load is not None else None
        wait = first_token(instance, workload, rate, load.num_seqs if load else 0.0)
        if wait is not None:
            for name, seconds in (("mean", wait.mean), ("p95", wait.percentile(0.95))):
                curves[name][0].append(step / 20)
                curves[name][1].append(seconds)
    return [{"type": "scatter", "x": x, "y": y, "name": name} for name, (x, y) in curves.items()]


def _shares(columns_of: Mapping[str, Mapping[str, float]]) -> list[Figure]:
    names = list(dict.fromkeys(name for times in columns_of.values() for name, t in times.items() if t))
    return [
        {
            "type": "bar",
            "name": name,
            "x": list(columns_of),
            "y": [times.get(name, 0.0) / sum(times.values()) for times in columns_of.values()],
        }
        for name in names
    ]


def training_page(plan: TrainPlan, rows: Rows) -> str:
    """`rows` is what the terminal shows."""
    page = Page(plan.scenario.name)
    page.table(rows)
    page.heading("Memory of a chip")
    page.chart([_stacked("GB", name, size / 1e9) for name, size in plan.memory.items()], barmode="stack",
               yaxis={"title": {"text": "GB"}})  # fmt: skip
    page.heading("More chips, at the same batch")
    counts, days = _scaling(plan)
    page.chart([{"type": "scatter", "x": counts, "y": days, "mode": "lines+markers"}],
               xaxis={"title": {"text": "chips"}, "type": "log"},
               yaxis={"title": {"text": "days"}, "type": "log"})  # fmt: skip
    return page.html()


def _scaling(plan: TrainPlan) -> tuple[list[int], list[float]]:
    """Days by chips, where the batch still gives every rank a micro batch."""
    from jinn.plan.tables import ScenarioError
    from jinn.plan.training import plan_training

    counts, days = [], []
    for power in range(-3, 4):
        try:
            chips = int(plan.scenario.parallel.chips * 2.0**power)
            parallel = replace(plan.scenario.parallel, chips=chips)
            other = plan_training(replace(plan.scenario, parallel=parallel))
        except ScenarioError:
            continue
        counts.append(chips)
        days.append(other.seconds / 86400)
    return counts, days


def market_page(found: Purchase | None, rows: Rows) -> str:
    """`rows` is what a budget buys; without one, only the market's tables."""
    page = Page(found.scenario.name if found else "The market")
    if found is not None:
        page.table(rows)
    years, companies = columns()
    page.heading("Capital spending by calendar year")
    page.note("Cash spent on property and equipment, without finance leases; sources in jinn's capex.csv.")
    page.chart(
        [
            {
                "type": "bar",
                "name": company,
                "x": [str(year) for year in years],
                "y": [by_year.get(year, 0.0) / 1e9 for year in years],
            }
            for company, by_year in companies.items()
        ],
        barmode="group",
        yaxis={"title": {"text": "billion USD"}},
        xaxis={"type": "category"},
    )
    page.heading("List prices per million tokens")
    page.table([_price_row(price) for price in token_prices()],
               ("provider", "model", "tier", "input", "cached", "output", "as of"))  # fmt: skip
    return page.html()


def _price_row(price: Any) -> tuple[str, ...]:
    cached = "" if price.cached_input is None else f"{price.cached_input:g}"
    output = f"{price.output:g} {price.currency}"
    return price.provider, price.model, price.tier, f"{price.input:g}", cached, output, price.as_of
