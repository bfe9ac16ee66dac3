"""`jinn conformance`: whether a server does what OpenAI's clients expect of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jinn.cli.progress import progress_bar


def conformance(
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="The server, such as http://127.0.0.1:8000/v1.")
    ],
    api_key: Annotated[str | None, typer.Option(metavar="KEY", help="Its key.", show_default="none")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model to ask.", show_default="the first listed")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="GROUP,GROUP", help="Only these groups.", show_default="all")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write a report, .html or .json.", show_default=False),
    ] = None,
) -> None:
    """Check a server that speaks OpenAI's API. The exit status is 1 if a check fails."""
    from jinn.conformance.checks import CHECKS
    from jinn.conformance.report import FAILED, run_checks
    from jinn.conformance.target import Failure, Target

    groups = None if only is None else only.split(",")
    for group in groups or ():
        if group not in CHECKS:
            raise ValueError(f"unknown group {group}; known are {', '.join(CHECKS)}")
    if report is not None and report.suffix not in (".html", ".json"):
        raise ValueError("--report must end in .html or .json")
    try:
        with progress_bar("Checking") as on_check:
            found = run_checks(Target(base_url, api_key, model), groups, on_check)
    except Failure as failure:
        raise ValueError(f"{base_url}: {failure}") from None
    if report is not None:
        report.write_text(found.to_html() if report.suffix == ".html" else found.to_json(), encoding="utf-8")
    print(found.to_text())
    if found.counts[FAILED]:
        raise typer.Exit(1)
