"""`jinn plan here`: this machine's probes as a chip, a model's speed predicted, and measured beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jinn.cli.options import DEFAULTS, ModelArgument, ThreadsOption, aligned

if TYPE_CHECKING:
    from jinn.plan.chips import ChipTable
    from jinn.plan.efficiency import Efficiency
    from jinn.plan.here import Calibration, Run


# Of 6 and 12 too, since kernels multiply few rows in another way than many, from 5 or from 9 rows on.
BATCH_SIZES = (4, 6, 12, 16)


def here(
    model: ModelArgument = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Reuse what --save wrote.", show_default=False),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the chip and the efficiencies fitted.", show_default=False),
    ] = None,
    only_predict: Annotated[
        bool, typer.Option("--predict", help="Only probe and predict; do not load the model.")
    ] = False,
    threads: ThreadsOption = None,
    repeat: Annotated[int, typer.Option(metavar="N", help="Runs of each; the quickest parts count.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict a model's speed on this machine, measure it, and compare."""
    from jinn.plan.here import to_toml
    from jinn.weights.model_store import resolve_model

    if repeat < 1:
        raise ValueError(f"--repeat must be at least 1, not {repeat}")
    if only_predict and save is not None:
        raise ValueError("--save has nothing to write with --predict: nothing is measured")
    comparison = compare(resolve_model(model), calibration, threads, 0 if only_predict else repeat)
    if save is not None:
        save.write_text(to_toml(comparison.calibration), encoding="utf-8")
    print(json.dumps(comparison.as_json()) if as_json else comparison.as_text())


@dataclass(frozen=True, slots=True)
class Comparison:
    """Predicted seconds of each run, and measured ones where they are."""

    model: str
    chip: ChipTable
    used: Efficiency
    predicted: Mapping[Run, float]
    measured: Mapping[Run, float]
    calibration: Calibration

    def rates(self, run: Run) -> tuple[float, float | None]:
        """Tokens per second."""
        seconds = self.measured.get(run)
        return run.all_tokens / self.predicted[run], run.all_tokens / seconds if seconds else None

    def as_json(self) -> dict[str, Any]:
        found = []
        for run in self.predicted:
            predicted, measured = self.rates(run)
            error = None if measured is None else predicted / measured - 1
            rates = {"predicted_tok_s": predicted, "measured_tok_s": measured}
            found.append({"run": str(run), **rates, "error": error})
        return {
            "model": self.model,
            "chip": self.chip.name,
            "limits": {name: getattr(self.chip, name) for name in ("bandwidth", "int8", "bf16", "f32")},
            "efficiency": asdict(self.used),
            "runs": found,
        }

    def as_text(self) -> str:
        rows = [("", "predicted", "measured", "error")]
        for run in self.predicted:
            predicted, measured = self.rates(run)
            beside = (f"{measured:,.1f}", f"{predicted / measured - 1:+.1%}") if measured else ("-", "-")
            rows.append((str(run), f"{predicted:,.1f}", *beside))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        head = f"{self.model} on {self.chip.name}, tokens/s; {self.used.provenance}: {self.used.source}"
        return "\n".join([head, *(aligned(row, widths) for row in rows)])


def compare(path: Path, calibration: Path | None, threads: int | None, repeat: int) -> Comparison:
    """Probe, predict, and with `repeat` measure as often and fit."""
    from jinn import _native, env
    from jinn.engine.benchmark import probe
    from jinn.plan import here as plan
    from jinn.plan.efficiency import find_efficiency
    from jinn.plan.shapes import shape_of
    from jinn.plan.speed import Machine

    known = plan.read_calibration(calibration) if calibration else plan.Calibration()
    shape = shape_of(str(path))
    num_threads = threads or _native.default_num_threads()
    kernels = _native.choose_kernels(env.isa() or "")
    name = f"this machine, {kernels.name}, {num_threads} threads"
    table = next((table for table in known.chips if table.name == name), None)
    if table is None:
        table = plan.machine_table(name, asdict(probe(num_threads, kernels)), physical_memory())
    chip = table.chip()
    used = plan.closest(shape, name, known.efficiencies)
    if used is None:
        used = find_efficiency(name, plan.ENGINE, shape.architecture, shape.precision)
    chunk = DEFAULTS["max_num_batched_tokens"]
    predicted = {run: plan.predict(shape, Machine(chip, used), run, chunk) for run in runs()}
    measured = measure_runs(path, num_threads, repeat, runs()) if repeat else {}
    if measured:
        row = plan.fit(shape, chip, used, measured, chunk)
        known = plan.Calibration(chips=(table,), efficiencies=plan.with_row(known.efficiencies, row))
    return Comparison(path.name, table, used, predicted, measured, known)


def physical_memory() -> float:
    """Bytes of the machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def runs() -> tuple[Run, ...]:
    """What is predicted and measured: prompts of three lengths, and decoding by depth and by batch."""
    from jinn.plan.here import Run

    prompts = tuple(Run(num_tokens) for num_tokens in (64, 256, 512))
    steps = ((1, 0), (1, 512), *((num_seqs, 128) for num_seqs in BATCH_SIZES))
    return *prompts, *(Run(24, num_seqs, depth) for num_seqs, depth in steps)


def measure_runs(path: Path, num_threads: int, repeat: int, wanted: Sequence[Run]) -> dict[Run, float]:
    """Seconds of each run: the least of each stage of a prompt, and of each step of decoding, added up.

    What others do on the machine only adds, so less is truer, and short parts are seldom disturbed each time.
    A run of each warms up first. Runs take turns, so that a busy minute of the machine falls on all of them.
    """
    from jinn.cli.bench import load_benchmark

    longest = max(run.depth + run.num_tokens for run in wanted)
    benchmark = load_benchmark(path, max(run.num_seqs for run in wanted), longest, num_threads)

    def seconds(run: Run) -> list[float]:
        if run.num_seqs:
            return benchmark.decode_seconds(run.num_seqs, run.num_tokens, run.depth)
        return benchmark.prefill_stage_seconds(run.num_tokens)

    rounds = [[seconds(run) for run in wanted] for _ in range(repeat + 1)][1:]
    by_run = zip(wanted, zip(*rounds, strict=True), strict=True)
    return {run: sum(min(each) for each in zip(*times, strict=True)) for run, times in by_run}
