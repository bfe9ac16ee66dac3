"""docs/serving.md says what the code does: each of its tables is what is built here from the code's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import typer.main
from prometheus_client import Metric
from pydantic import BaseModel

import jinn.server
from jinn.cli.main import make_app
from jinn.engine.config import EngineConfig
from jinn.engine.messages import EngineStats
from jinn.frontend import _SAMPLING_FIELDS
from jinn.server.config import ServerConfig
from jinn.server.limits import LIMITS, MAX_COUNT
from jinn.server.metrics import Metrics
from jinn.server.parameters import ACCEPTED, REFUSED_CHAT, REFUSED_COMPLETION
from jinn.server.schemas import ChatRequest, CompletionRequest, SamplingFields

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
UNITS = {"string": " characters", "list": " items", "object": " entries"}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def implemented(model: type[BaseModel]) -> list[tuple[str, ...]]:
    """A row for each field of `model` that the fields of all APIs do not have, or have otherwise."""
    shared = {} if model is SamplingFields else SamplingFields.model_fields
    return [
        (f"`{name}`", takes(name, field.annotation), default(name, field.default), field.description or "")
        for name, field in model.model_fields.items()
        if name not in shared or shared[name].default != field.default
    ]


def takes(name: str, annotation: Any) -> str:
    if annotation is bool or annotation == (bool | None):
        return "`true`, `false`"
    for part in get_args(annotation):
        if get_origin(part) is Literal:
            return ", ".join(f"`{json.dumps(value)}`" for value in get_args(part))
    limit = LIMITS.get("n" if name == "best_of" else name)
    if limit is None:
        return "an object"
    low = f"more than {limit.minimum}" if limit.is_exclusive else f"{limit.minimum}"
    high = "" if limit.maximum >= MAX_COUNT else f" to {limit.maximum}"
    return low + (high or " or more") + UNITS.get(limit.type, "")


def default(name: str, value: Any) -> str:
    if name in _SAMPLING_FIELDS:
        return "the model's"
    if value is None and name in LIMITS:
        value = LIMITS[name].default
    if isinstance(value, int | str):
        return f"`{json.dumps(value)}`"
    return ""


def refused(parameters: dict[str, tuple[Any, ...]]) -> list[tuple[str, ...]]:
    return [
        (f"`{name}`", ", ".join(f"`{json.dumps(value)}`" for value in values))
        for name, values in parameters.items()
    ]


def options() -> list[tuple[str, ...]]:
    def shown(default: Any) -> str:
        return default if isinstance(default, str) else ""

    serve = typer.main.get_command(make_app()).commands["serve"]  # type: ignore[attr-defined]
    flags = [option for option in serve.params if option.opts[0].startswith("--")]
    return [(f"`{flag.opts[0]}`", shown(flag.show_default), flag.help) for flag in flags]


def metrics() -> list[tuple[str, ...]]:
    def name(family: Metric) -> str:
        return f"`{family.name}{'_total' if family.type == 'counter' else ''}`"

    families = Metrics("m", EngineStats).registry.collect()
    return [(name(family), family.type, family.documentation) for family in families]


TABLES = {
    "options": table(("Option", "Default", ""), options()),
    "both APIs": table(("Parameter", "Takes", "Default", ""), implemented(SamplingFields)),
    "chat": table(("Parameter", "Takes", "Default", ""), implemented(ChatRequest)),
    "completions": table(("Parameter", "Takes", "Default", ""), implemented(CompletionRequest)),
    "accepted": table(
        ("Parameter", "Why it changes nothing"), [(f"`{name}`", why) for name, why in ACCEPTED.items()]
    ),
    "refused": table(("Parameter", "Values that pass"), refused({**REFUSED_COMPLETION, **REFUSED_CHAT})),
    "metrics": table(("Metric", "Type", ""), metrics()),
}


@pytest.mark.parametrize("name", TABLES)
def test_table(name: str) -> None:
    assert TABLES[name] in PAGE


def test_settings_without_a_flag() -> None:
    settings = {field.name for field in (*fields(EngineConfig), *fields(ServerConfig))}
    flags = {row[0].strip("`-").replace("-", "_") for row in options()}
    flags |= {"model", "num_threads", "lora_adapters"}  # --model, --threads and --lora
    section = PAGE[PAGE.index("### Settings of the file") : PAGE.index("## Requests")]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == settings - flags


def test_error_codes() -> None:
    sources = "".join(path.read_text() for path in Path(jinn.server.__path__[0]).rglob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', sources)) | {"not_found", "method_not_allowed"}
    section = PAGE[PAGE.index("## Errors") :]
    assert set(re.findall(r"`(\w+)`", section[: section.index("\n## ")])) >= codes
