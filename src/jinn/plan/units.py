"""Quantities with units: "608e9 tokens/day", "73.7k tokens/s", "2 USD/h", "40 ms", "80 GB", "55%".

Inside the planner every number is in base units: seconds, tokens, bytes, operations, joules, and the currency
that a scenario names, which declarations call `$`. Only reading and printing know other units.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

CURRENCIES = ("USD", "CNY", "EUR")
DOLLARS: Mapping[str, float] = {"USD": 1.0}
"""What one of each currency is worth in the planner's own, which units call `$`."""

_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_HOUR, _DAY, _YEAR = 3600.0, 86400.0, 365 * 86400.0


@dataclass(frozen=True, slots=True)
class Unit:
    """`factor` base units of `dimension`: base names with their powers, none of them zero."""

    factor: float
    dimension: Mapping[str, int]


def _units() -> dict[str, Unit]:
    seconds = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": _HOUR, "hour": _HOUR, "day": _DAY}
    seconds |= {"days": _DAY, "year": _YEAR, "years": _YEAR, "month": _YEAR / 12, "months": _YEAR / 12}
    table = {name: Unit(factor, {"s": 1}) for name, factor in seconds.items()}
    for name in ("token", "request", "user", "chip", "node", "parameter"):
        table[name] = table[name + "s"] = Unit(1.0, {name: 1})
    table["$"] = Unit(1.0, {"$": 1})
    table |= {f"{prefix}B": Unit(factor, {"byte": 1}) for prefix, factor in _PREFIXES.items()}
    table |= {f"{p}iB": Unit(1024.0**power, {"byte": 1}) for power, p in enumerate("KMGT", 1)}
    table |= {f"{prefix}b": Unit(factor / 8, {"byte": 1}) for prefix, factor in _PREFIXES.items()}
    table |= {f"{prefix}FLOP": Unit(factor, {"flop": 1}) for prefix, factor in _PREFIXES.items()}
    table |= {f"{prefix}FLOPS": Unit(factor, {"flop": 1, "s": -1}) for prefix, factor in _PREFIXES.items()}
    table |= {f"{prefix}W": Unit(factor, {"joule": 1, "s": -1}) for prefix, factor in _PREFIXES.items()}
    table |= {f"{prefix}Wh": Unit(factor * _HOUR, {"joule": 1}) for prefix, factor in _PREFIXES.items()}
    table |= {f"{prefix}tokens": Unit(factor, {"token": 1}) for prefix, factor in _PREFIXES.items()}
    return table | {"%": Unit(0.01, {}), "1": Unit(1.0, {})}


_UNITS = _units()
_DURATIONS = (("years", _YEAR), ("days", _DAY), ("h", _HOUR), ("min", 60.0))
_NUMBER = re.compile(r"(?P<number>[+-]?(?:\d[\d,_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(?P<unit>.*)", re.ASCII)


class UnitError(ValueError):
    """A quantity that cannot be read as what its field asks for."""


def unit(text: str, money: Mapping[str, float] = DOLLARS) -> Unit:
    """The unit `tokens/s` or `USD/kWh` stands for. Raises UnitError naming the part that is unknown."""
    factor, dimension = 1.0, Counter[str]()
    for index, part in enumerate(text.split("/")):
        sign = 1 if index == 0 else -1
        name = part.strip()
        found = _UNITS.get(name) or _scaled_unit(name) or _currency(name, money)
        if found is None:
            raise UnitError(f"unit {name!r} is not known")
        factor *= found.factor**sign
        for base, power in found.dimension.items():
            dimension[base] += sign * power
    return Unit(factor, {base: power for base, power in dimension.items() if power})


def _scaled_unit(name: str) -> Unit | None:
    """`M tokens`, `k requests`: a prefix before a unit that has none of its own."""
    prefix, _, rest = name.partition(" ")
    if prefix in _PREFIXES and prefix and rest.strip() in _UNITS:
        found = _UNITS[rest.strip()]
        return Unit(found.factor * _PREFIXES[prefix], found.dimension)
    return None


def _currency(name: str, money: Mapping[str, float]) -> Unit | None:
    if name in CURRENCIES and name not in money:
        raise UnitError(f"has {name}, but the scenario's [exchange] does not say what that is worth")
    return Unit(money[name], {"$": 1}) if name in money else None


def parse(value: object, wanted: str, money: Mapping[str, float] = DOLLARS) -> float:
    """`value` in `wanted` units; a plain number is in these already.

    A string has a number and a unit of the same dimension; `k`, `M`, `G`, `T` or `P` right after the number
    multiplies it. Raises UnitError.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UnitError(f"must be a number or text like '3 {wanted}', not {value!r}")
    if not isinstance(value, str):
        return _finite(float(value), value)
    match = _NUMBER.fullmatch(value.strip())
    if match is None:
        raise UnitError(f"{value!r} does not begin with a number")
    number = float(match["number"].replace(",", "").replace("_", ""))
    text = match["unit"].strip()
    prefix, _, rest = text.partition(" ")
    if prefix in _PREFIXES and prefix:
        number, text = number * _PREFIXES[prefix], rest.strip()
    if not text:
        return _finite(number, value)
    given, target = unit(text, money), unit(wanted)
    if given.dimension != target.dimension:
        raise UnitError(f"{value!r} is not in units of {wanted}")
    return _finite(number * given.factor / target.factor, value)


def _finite(number: float, value: object) -> float:
    if not math.isfinite(number):
        raise UnitError(f"must be a finite number, not {value!r}")
    return number


def convert(number: float, given: str, wanted: str) -> float:
    """`number` of unit `given` in unit `wanted`. Raises UnitError where they measure different things."""
    source, target = unit(given), unit(wanted)
    if source.dimension != target.dimension:
        raise UnitError(f"{given} cannot be converted to {wanted}")
    return number * source.factor / target.factor


def short(number: float, digits: int = 3) -> str:
    """For people: `562k`, `1.24M`, `0.0123`."""
    if number == 0:
        return "0"
    for factor, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{_rounded(number / factor, digits)}{suffix}"
    return _rounded(number, digits)


def _rounded(number: float, digits: int) -> str:
    text = f"{number:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text else text


def money(amount: float, currency: str) -> str:
    """For people: `87,114 USD`, `1.37 USD`."""
    return f"{amount:,.0f} {currency}" if abs(amount) >= 1000 else f"{amount:,.4g} {currency}"


def duration(seconds: float) -> str:
    """For people: `24.5 ms`, `1.6 s`, `78 days`; at least two of a unit above the second."""
    for name, size in _DURATIONS:
        if seconds >= 2 * size:
            return f"{_rounded(seconds / size, 3)} {name}"
    for name, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_rounded(seconds / size, 3)} {name}"
    return f"{_rounded(seconds * 1e6, 3)} us"
