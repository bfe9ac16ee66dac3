"""This machine as a chip: predicts what a benchmark will measure, and fits efficiencies to what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from jinn.plan.chips import Chip, ChipTable
from jinn.plan.efficiency import ANY, Efficiency
from jinn.plan.shapes import Shape
from jinn.plan.speed import Machine, Placement, Step, step_seconds, total
from jinn.plan.tables import ScenarioError, load, read, tables

ENGINE = "jinn"
MAX_ROUNDS = 200
POOR = 0.03  # mean error of a fit that is tried again


@dataclass(frozen=True, slots=True)
class Run:
    """What a benchmark times: a prompt of `num_tokens`, or that many steps of `num_seqs` sequences."""

    num_tokens: int
    num_seqs: int = 0  # 0: a prompt is read
    depth: int = 0  # tokens in the cache before

    def __str__(self) -> str:
        if not self.num_seqs:
            return f"prefill {self.num_tokens}"
        return f"decode at {self.depth}, batch {self.num_seqs}"

    @property
    def all_tokens(self) -> int:
        return self.num_tokens * max(1, self.num_seqs)


def machine_table(name: str, limits: Mapping[str, float], memory: float) -> ChipTable:
    """A chip of the probes of `jinn bench`: int8, bf16 and f32 operations/s, read_bandwidth."""
    values = {kind: limits[kind] for kind in ("int8", "bf16", "f32")}
    return ChipTable(
        name=name,
        source="probed by jinn",
        bandwidth=limits["read_bandwidth"],
        memory=memory,
        scaleup_size=1,
        **values,
    )


def predict(shape: Shape, machine: Machine, run: Run, chunk: int) -> float:
    """Seconds of a run; a prompt is read in steps of at most `chunk` tokens."""
    if run.num_seqs:
        step = Step.decode(run.num_seqs, run.depth + (run.num_tokens + 1) / 2)
        return run.num_tokens * total(step_seconds(shape, machine, Placement(), step))
    seconds = 0.0
    for start in range(0, run.num_tokens, chunk):
        tokens = min(chunk, run.num_tokens - start)
        is_last = start + tokens == run.num_tokens
        step = Step(tokens, start + tokens / 2, 1, float(is_last), True)
        seconds += total(step_seconds(shape, machine, Placement(), step))
    return seconds


# What a fit may change, with the least and the most of each.
FITTED: Mapping[str, tuple[float, float]] = {
    "linear": (1e-3, 1.0),
    "experts": (1e-3, 1.0),
    "attention": (1e-3, 1.0),
    "weights": (0.02, 1.0),
    "kv": (0.02, 1.0),
    "layer": (1e-7, 1e-2),
    "unpack": (0.1, 256.0),
    "few": (1.0, 64.0),
}


def fit(shape: Shape, chip: Chip, start: Efficiency, measured: Mapping[Run, float], chunk: int) -> Efficiency:
    """Efficiencies that make predictions agree with measured seconds: least squares of logarithms.

    A pattern search: each value is multiplied or divided by a factor that shrinks when nothing helps. Ties
    with the start are kept, so that what no run depends on stays as it was. From where tiles of rows are dear
    it may never find that they pay, so a poor fit is tried once more from where they are cheap.
    """

    def badness(efficiency: Efficiency) -> float:
        machine = Machine(chip, efficiency)
        return sum(
            math.log(predict(shape, machine, run, chunk) / seconds) ** 2 for run, seconds in measured.items()
        )

    best = _search(start, badness)
    if badness(best) > len(measured) * POOR**2:
        best = min(best, _search(replace(start, unpack=start.unpack / 4), badness), key=badness)
    return replace(
        best,
        chip=chip.name,
        engine=ENGINE,
        architecture=shape.architecture,
        precision=shape.precision,
        provenance="calibrated",
        source=f"{shape.name} on this machine",
    )


def _search(start: Efficiency, badness: Callable[[Efficiency], float]) -> Efficiency:
    best, least = start, badness(start)
    factor = 2.0
    for _ in range(MAX_ROUNDS):
        best, found = _improved(best, least, factor, badness)
        if found > 0.999 * least:
            factor = math.sqrt(factor)
        least = found
        if factor < 1.002:
            break
    return best


def _improved(
    best: Efficiency, least: float, factor: float, badness: Callable[[Efficiency], float]
) -> tuple[Efficiency, float]:
    for name, (low, high) in FITTED.items():
        for step in (factor, 1 / factor):
            value = min(high, max(low, getattr(best, name) * step))
            candidate = replace(best, **{name: value})
            found = badness(candidate)
            if found < least:
                best, least = candidate, found
    return best, least


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a file keeps: this machine as a chip, and efficiencies by class and precision."""

    chips: tuple[ChipTable, ...] = tables(ChipTable)
    efficiencies: tuple[Efficiency, ...] = tables(Efficiency)


def read_calibration(path: Path) -> Calibration:
    """Raises ScenarioError naming the field."""
    return read(Calibration, load(path))


def closest(shape: Shape, chip: str, own: Iterable[Efficiency]) -> Efficiency | None:
    """The row fitted on this chip for the shape's class and precision, or one of the two, or any."""
    rows = [row for row in own if row.chip == chip and row.engine == ENGINE]
    if not rows:
        return None

    def likeness(row: Efficiency) -> tuple[bool, bool]:
        return row.precision in (shape.precision, ANY), row.architecture in (shape.architecture, ANY)

    return max(rows, key=likeness)


def with_row(rows: Sequence[Efficiency], row: Efficiency) -> tuple[Efficiency, ...]:
    """Rows with this one in place of one of the same key."""
    return (*(other for other in rows if other.key != row.key), row)


def to_toml(calibration: Calibration) -> str:
    """The file's text: tables that scenarios may hold as well."""
    lines = []
    for kind, items in (("chips", calibration.chips), ("efficiencies", calibration.efficiencies)):
        for item in items:
            lines.append(f"[[{kind}]]")
            for declaration in fields(item):
                value = getattr(item, declaration.name)
                if value is not None:
                    lines.append(f"{declaration.name} = {_toml(value)}")
            lines.append("")
    return "\n".join(lines)


def _toml(value: str | float) -> str:
    if isinstance(value, str):
        if any(ord(character) < 32 for character in value):
            raise ScenarioError(f"{value!r} has a control character")
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)
