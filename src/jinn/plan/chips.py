"""What chips can do: the catalogue, chips that users describe in TOML, and no guess at what is missing."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.resources import files

from jinn.plan.tables import ScenarioError, count, quantity, text

# How each column of the catalogue is kept here: the field's name, and base units per unit of the column.
FACTS = {
    "bf16_tflops": ("bf16", 1e12),
    "fp8_tflops": ("fp8", 1e12),
    "int8_tops": ("int8", 1e12),
    "memory_gb": ("memory", 1e9),
    "bandwidth_gb_s": ("bandwidth", 1e9),
    "scaleup_gb_s": ("scaleup", 1e9),
    "scaleup_size": ("scaleup_size", 1.0),
    "scaleout_gb_s": ("scaleout", 1e9),
    "power_w": ("power", 1.0),
    "price_usd": ("price", 1.0),
    "rent_usd_h": ("rent", 1 / 3600.0),
}


class MissingFactError(ScenarioError):
    """A chip lacks a fact that the plan needs."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A number with where it is from; `low` and `high` where sources disagree or estimate.

    Peaks are dense. Confidence: V read in a source, D recalled, E press estimate, X sources disagree.
    """

    value: float
    low: float
    high: float
    source: str
    date: str
    confidence: str


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip's facts by name, in base units; `fact` gives one, or refuses by its name.

    Peaks bf16, fp8, int8 (dense operations/s) · memory (bytes) · bandwidth (bytes/s) · scaleup, scaleout
    (bytes/s one way) · scaleup_size (chips that scaleup joins) · power (W) · price, rent (USD, USD/s).
    """

    name: str
    facts: Mapping[str, Fact]

    def fact(self, name: str) -> float:
        """Raises MissingFactError."""
        found = self.facts.get(name)
        if found is None:
            raise MissingFactError(
                f"chip {self.name!r}: {name} is not known; give it under [[chips]] with its source"
            )
        return found.value

    def has(self, name: str) -> bool:
        return name in self.facts

    @property
    def scaleup_size(self) -> int:
        """Chips that one fast network joins; one where nothing is known of a network."""
        return int(self.facts["scaleup_size"].value) if self.has("scaleup_size") else 1

    def peak(self, precision: str) -> float:
        """Dense operations/s; bf16's where the chip has none for this precision."""
        return self.fact(precision if self.has(precision) else "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipTable:
    """A chip that a scenario describes."""

    name: str = text()
    source: str = text("the scenario")
    bf16: float | None = quantity("FLOPS", None, positive=True)
    fp8: float | None = quantity("FLOPS", None, positive=True)
    int8: float | None = quantity("FLOPS", None, positive=True)
    f32: float | None = quantity("FLOPS", None, positive=True)
    memory: float | None = quantity("B", None, positive=True)
    bandwidth: float | None = quantity("B/s", None, positive=True)
    scaleup: float | None = quantity("B/s", None, positive=True)
    scaleup_size: int | None = count(None)
    scaleout: float | None = quantity("B/s", None, positive=True)
    power: float | None = quantity("W", None, positive=True)
    price: float | None = quantity("$", None, positive=True)
    rent: float | None = quantity("$/s", None, positive=True)

    def chip(self) -> Chip:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "source")}
        facts = {
            name: Fact(value, value, value, self.source, "", "given")
            for name, value in values.items()
            if value is not None
        }
        return Chip(self.name, facts)


@cache
def catalogue() -> Mapping[str, Chip]:
    """Every chip that jinn has facts of, by name."""
    facts: dict[str, dict[str, Fact]] = {}
    for row in rows("chips.csv"):
        name, factor = FACTS[row["fact"]]
        value, low, high = (
            float(row[column] or row["value"]) * factor for column in ("value", "low", "high")
        )
        fact = Fact(value, low, high, row["source"], row["date"], row["confidence"])
        facts.setdefault(row["chip"], {})[name] = fact
    return {name: Chip(name, found) for name, found in facts.items()}


def find_chip(name: str, own: Mapping[str, Chip] | None = None) -> Chip:
    """A chip by its name, or by a part of it that only one name has. Raises ScenarioError."""
    chips = {**catalogue(), **(own or {})}
    if name in chips:
        return chips[name]
    wanted = name.lower().split()
    found = [
        chip
        for chip in chips.values()
        if all(word in chip.name.lower().split() or word in chip.name.lower() for word in wanted)
    ]
    exact = [chip for chip in found if set(wanted) <= set(chip.name.lower().split())]
    found = exact or found
    if len(found) == 1:
        return found[0]
    options = ", ".join(sorted(chip.name for chip in found or chips.values()))
    reason = "is several chips" if found else "is not in the catalogue"
    raise ScenarioError(f"chip {name!r} {reason}: {options}")


def rows(file: str) -> Iterator[dict[str, str]]:
    """The rows of a table that the package brings."""
    lines = (files("jinn.plan") / "data" / file).read_text(encoding="utf-8").splitlines()
    yield from csv.DictReader(lines)
