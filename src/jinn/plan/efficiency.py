"""What share of a chip's peaks software reaches, and its fixed times; every row says where it is from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache

from jinn.plan.chips import rows
from jinn.plan.tables import ScenarioError, choice, quantity, text

ANY = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of peaks, and seconds; keyed by chip, engine, class of architecture and precision (`*`: any).

    Shares of the peak of arithmetic: linear, experts, attention. Of the memory's bandwidth: weights, kv. Of a
    link's: link. `overlap` is the share of the shorter of computing and exchanging experts that hides behind
    the other when two half batches alternate; 0 where they do not. Seconds: collective (each), layer (each),
    step, request (each sequence of a step), first_token (a request's way in and out).
    """

    chip: str = text(ANY)
    engine: str = text(ANY)
    architecture: str = text(ANY)
    precision: str = text(ANY)
    linear: float = quantity("1", positive=True, high=1.0)
    experts: float = quantity("1", positive=True, high=1.0)
    attention: float = quantity("1", positive=True, high=1.0)
    weights: float = quantity("1", positive=True, high=1.0)
    kv: float = quantity("1", positive=True, high=1.0)
    link: float = quantity("1", 0.7, positive=True, high=1.0)
    overlap: float = quantity("1", 0.0, high=1.0)
    collective: float = quantity("s", 10e-6)
    layer: float = quantity("s", 25e-6)
    step: float = quantity("s", 200e-6)
    request: float = quantity("s", 5e-6)
    first_token: float = quantity("s", 5e-3)
    tile: float = quantity("1", 64.0, low=1.0)  # rows of activations that are multiplied at once
    unpack: float = quantity("1", 0.0)  # rows that take as long as what is done once with the weights
    few: float = quantity("1", 1e6, low=1.0)  # times as long as one of many that each of few rows takes
    attention_arithmetic: str = choice(("bf16", "f32"), "bf16")
    provenance: str = text("assumed")  # measured, calibrated or assumed
    source: str = text("the scenario")

    def matches(self, key: tuple[str, str, str, str]) -> bool:
        return all(own in (ANY, name) for own, name in zip(self.key, key, strict=True))

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.chip, self.engine, self.architecture, self.precision


@cache
def published() -> tuple[Efficiency, ...]:
    """The rows that jinn brings."""
    return tuple(_row(row) for row in rows("efficiencies.csv"))


def _row(row: Mapping[str, str]) -> Efficiency:
    values: dict[str, object] = {}
    for declaration in fields(Efficiency):
        value = row[declaration.name]
        values[declaration.name] = float(value) if declaration.metadata["kind"] == "quantity" else value
    return Efficiency(**values)  # type: ignore[arg-type]


def find_efficiency(
    chip: str, engine: str, architecture: str, precision: str, own: Iterable[Efficiency] = ()
) -> Efficiency:
    """The most specific row, the scenario's own before the published: by chip, engine, class, precision.

    Raises ScenarioError where the engine has no row at all.
    """
    key = (chip, engine, architecture, precision)
    candidates = [row for row in (*own, *published()) if row.matches(key)]
    if not candidates:
        engines = sorted({row.engine for row in published()})
        raise ScenarioError(f"engine {engine!r} has no efficiencies; there are {', '.join(engines)}")
    return max(candidates, key=lambda row: [part != ANY for part in row.key])
