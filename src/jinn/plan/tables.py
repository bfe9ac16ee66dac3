"""Reads TOML tables into frozen dataclasses, strictly: every error names the field and the reason.

A dataclass declares each field with `quantity`, `count`, `choice`, `text`, `table` or `tables`; `read` checks
what a file gives against that, so the declaration is the only place that knows a field's unit and range.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, TypeVar

from jinn.plan.units import DOLLARS, UnitError, parse

Table = TypeVar("Table")


class ScenarioError(ValueError):
    """A scenario that cannot be planned; one line that names the field."""


def quantity(
    unit: str, default: Any = MISSING, *, low: float = 0.0, high: float = math.inf, positive: bool = False
) -> Any:
    """A number in `unit`, at least `low` (more than 0 if `positive`) and at most `high`."""
    return field(
        default=default,
        metadata={"kind": "quantity", "unit": unit, "low": low, "high": high, "positive": positive},
    )


def share(default: Any = MISSING) -> Any:
    """A number from 0 to 1."""
    return quantity("1", default, high=1.0)


def count(default: Any = MISSING, *, low: int = 1, high: int = 2**53) -> Any:
    """A whole number."""
    return field(default=default, metadata={"kind": "count", "low": low, "high": high})


def choice(choices: tuple[str, ...], default: Any = MISSING) -> Any:
    return field(default=default, metadata={"kind": "choice", "choices": choices})


def text(default: Any = MISSING) -> Any:
    return field(default=default, metadata={"kind": "text"})


def texts(default: Any = MISSING) -> Any:
    """A list of names, or one."""
    return field(default=default, metadata={"kind": "texts"})


def flag(default: bool) -> Any:
    return field(default=default, metadata={"kind": "flag"})


def numbers(unit: str, default: Any = MISSING, *, low: float = 0.0) -> Any:
    """A list of numbers."""
    return field(default=default, metadata={"kind": "numbers", "unit": unit, "low": low})


def table(cls: type[Any], default: Any = MISSING) -> Any:
    """A table of its own."""
    return field(default=default, metadata={"kind": "table", "cls": cls})


def tables(cls: type[Any]) -> Any:
    """A list of tables."""
    return field(default=(), metadata={"kind": "tables", "cls": cls})


def load(path: Path) -> dict[str, Any]:
    """A TOML file's table. Raises ScenarioError naming the file and the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScenarioError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: is not TOML: {error}") from None


def read(cls: type[Table], values: object, where: str = "", money: Mapping[str, float] = DOLLARS) -> Table:
    """The dataclass that a table describes, amounts in the currency that `money` is relative to.

    Raises ScenarioError.
    """
    if not isinstance(values, Mapping):
        raise ScenarioError(f"{where or 'the scenario'} must be a table, not {values!r}")
    declared = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for name in values:
        if name not in declared:
            raise ScenarioError(f"{prefix}{name} is not a field; there are {', '.join(declared)}")
    given = {}
    for name, declaration in declared.items():
        if name in values:
            given[name] = _value(declaration, values[name], prefix + name, money)
        elif declaration.default is MISSING and declaration.default_factory is MISSING:
            raise ScenarioError(f"{prefix}{name} is missing")
    try:
        return cls(**given)
    except ScenarioError as error:
        raise ScenarioError(f"{prefix}{error}") from None


def _value(declaration: Field[Any], value: object, name: str, money: Mapping[str, float]) -> Any:
    rule = declaration.metadata
    kind = rule["kind"]
    if kind == "table":
        return read(rule["cls"], value, name, money)
    if kind == "texts":
        names = value if isinstance(value, list) and value else [value]
        return tuple(_word({"kind": "text"}, item, name) for item in names)
    if kind in ("tables", "numbers"):
        if not isinstance(value, list) or not value:
            raise ScenarioError(f"{name} must be a list with something in it, not {value!r}")
        if kind == "tables":
            return tuple(
                read(rule["cls"], item, f"{name}[{index}]", money) for index, item in enumerate(value)
            )
        return tuple(_number(rule, item, f"{name}[{index}]", money) for index, item in enumerate(value))
    if kind == "quantity":
        return _number(rule, value, name, money)
    if kind == "count":
        return _whole(rule, value, name)
    return _word(rule, value, name)


def _number(rule: Mapping[str, Any], value: object, name: str, money: Mapping[str, float]) -> float:
    try:
        number = parse(value, rule["unit"], money)
    except UnitError as error:
        raise ScenarioError(f"{name} {error}") from None
    if number < rule["low"] or (rule.get("positive") and number <= 0):
        least = "more than 0" if rule.get("positive") else f"at least {rule['low']:g}"
        raise ScenarioError(f"{name} must be {least}, not {value!r}")
    if number > rule.get("high", math.inf):
        raise ScenarioError(f"{name} must be at most {rule['high']:g}, not {value!r}")
    return number


def _whole(rule: Mapping[str, Any], value: object, name: str) -> int:
    if isinstance(value, str):
        try:
            value = parse(value, "1")
        except UnitError as error:
            raise ScenarioError(f"{name} {error}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise ScenarioError(f"{name} must be a whole number, not {value!r}")
    whole = int(value)
    if not rule["low"] <= whole <= rule["high"]:
        raise ScenarioError(f"{name} must be from {rule['low']} to {rule['high']}, not {whole}")
    return whole


def _word(rule: Mapping[str, Any], value: object, name: str) -> object:
    if rule["kind"] == "flag":
        if not isinstance(value, bool):
            raise ScenarioError(f"{name} must be true or false, not {value!r}")
        return value
    if not isinstance(value, str) or not value.strip():
        raise ScenarioError(f"{name} must be text, not {value!r}")
    if rule["kind"] == "choice" and value not in rule["choices"]:
        raise ScenarioError(f"{name} must be one of {', '.join(rule['choices'])}, not {value!r}")
    return value
