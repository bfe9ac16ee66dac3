"""Runs the checks, and tells what came of them."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass

from jinn.conformance.checks import CHECKS, Check
from jinn.conformance.target import Failure, Skip, Target

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found. `detail` says why it failed or was skipped."""

    group: str
    name: str
    title: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All results of one server."""

    base_url: str
    model: str
    results: tuple[Result, ...]

    @property
    def counts(self) -> Counter[str]:
        return Counter(result.outcome for result in self.results)

    @property
    def summary(self) -> str:
        return ", ".join(f"{self.counts[outcome]} {outcome}" for outcome in (PASSED, FAILED, SKIPPED))

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "counts": dict(self.counts)}, indent=1, ensure_ascii=False) + "\n"

    def to_html(self) -> str:
        rows = "".join(
            f'<tr class="{result.outcome}"><td>{result.group}<td>{html.escape(result.title)}'
            f"<td>{result.outcome}<td>{html.escape(result.detail)}\n"
            for result in self.results
        )
        url, model = html.escape(self.base_url), html.escape(self.model)
        return _PAGE.format(url=url, model=model, counts=self.summary, rows=rows)

    def to_text(self) -> str:
        """A line for each check that did not pass, and the counts."""
        lines = [
            f"{result.outcome:8} {result.group}: {result.title}: {result.detail}"
            for result in self.results
            if result.outcome != PASSED
        ]
        return "\n".join([*lines, self.summary])


def run_checks(
    target: Target, only: Collection[str] | None = None, on_check: Callable[[int, int], None] | None = None
) -> Report:
    """Run the checks of these groups, or all. Raises Failure where the server cannot be asked at all.

    `on_check` is called with the checks that are done, and all.
    """
    if not target.model:
        target.model = str(target.get("/models").ok()["data"][0]["id"])
    checks = [(group, check) for group in CHECKS if only is None or group in only for check in CHECKS[group]]
    results = []
    for number, (group, check) in enumerate(checks, 1):
        results.append(_run(target, group, check))
        if on_check is not None:
            on_check(number, len(checks))
    return Report(target.base_url, target.model, tuple(results))


def _run(target: Target, group: str, check: Check) -> Result:
    title = (check.__doc__ or "").strip()
    try:
        check(target)
    except Skip as skip:
        return Result(group, check.__name__, title, SKIPPED, str(skip))
    except Failure as failure:
        return Result(group, check.__name__, title, FAILED, str(failure))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        detail = f"the answer has another shape: {type(error).__name__}: {str(error)[:120]}"
        return Result(group, check.__name__, title, FAILED, detail)
    except OSError as error:
        return Result(group, check.__name__, title, FAILED, f"no answer: {error}")
    return Result(group, check.__name__, title, PASSED)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Conformance of {url}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td {{ border-bottom: 1px solid #ccc; padding: .25rem .5rem; vertical-align: top; overflow-wrap: anywhere }}
.failed td:nth-child(3) {{ color: #b00; font-weight: bold }}
.skipped {{ color: #777 }}
</style>
<h1>Conformance</h1>
<p>{url}, model {model}: {counts}</p>
<table>
{rows}</table>
</html>
"""
