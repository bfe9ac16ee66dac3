"""Predict the speed of models on this machine, measure them, and check that both agree.

SmolLM2 in four formats and three published shapes with random weights. Of each, some runs calibrate and
others are predicted: prompts, depths and batches that the fit has not seen. For the random shapes the errors
are also given with what other models' runs have fitted. Writes build/plan-here.toml, for `jinn plan here`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

from jinn import _native, env
from jinn.cli.here import BATCH_SIZES, measure_runs, physical_memory
from jinn.cli.options import DEFAULTS
from jinn.engine.benchmark import probe
from jinn.plan.efficiency import find_efficiency
from jinn.plan.here import ENGINE, Calibration, Run, closest, fit, machine_table, predict, to_toml, with_row
from jinn.plan.shapes import shape_of
from jinn.plan.speed import Machine
from jinn.weights.model_store import resolve_model

LIMIT = 0.15
FORMATS = ("q4_1", "q4_0", "q8_0", "bf16")
SHAPES = (("SmolLM2-360M", None), ("Qwen3-0.6B", None), ("Qwen3-30B-A3B", 4))
BATCHES = tuple(Run(24, num_seqs, 128) for num_seqs in BATCH_SIZES)
FITTED = (Run(64), Run(512), Run(24, 1), Run(24, 1, 768), *BATCHES)
CHECKED = (Run(384), Run(24, 1, 256), Run(24, 8, 128))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=_native.default_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="times that all models are measured")
    parser.add_argument("--repeat", type=int, default=3, help="times that a model is measured in a round")
    parser.add_argument("--folder", type=Path, default=Path("build") / "plan-here")
    parser.add_argument("--only", default="", help="models whose names contain this")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kernels = _native.choose_kernels(env.isa() or "")
    paths = dict(models(arguments.folder, arguments.only))
    limits, measured = measure(paths, arguments.threads, arguments.rounds, arguments.repeat, kernels)
    name = f"this machine, {kernels.name}, {arguments.threads} threads"
    table = machine_table(name, limits, physical_memory())
    print(f"{name}: reads {table.bandwidth / 1e9:.1f} GB/s, int8 {table.int8 / 1e12:.2f} Top/s")
    known, worst = Calibration(chips=(table,)), []
    for path, is_random in paths.items():
        known, errors = check(path, is_random, known, measured[path])
        worst += errors
    (arguments.folder.parent / "plan-here.toml").write_text(to_toml(known), encoding="utf-8")
    missed = [error for error in worst if abs(error) > LIMIT]
    print(f"median {median(map(abs, worst)):.1%}, worst {max(worst, key=abs):+.1%}")
    print(f"{len(missed)} of {len(worst)} beyond {LIMIT:.0%}")
    return 1 if missed else 0


def measure(
    paths: Iterable[Path], threads: int, rounds: int, repeat: int, kernels: _native.Kernels
) -> tuple[dict[str, float], dict[Path, dict[Run, float]]]:
    """The machine's limits, the best of a probe before each model; and each model's seconds by run.

    A run's are the least of all rounds: from one of a model to the next all others have their turn, so that a
    slow minute of the machine does not tell.
    """
    limits: dict[str, float] = {}
    measured: dict[Path, dict[Run, float]] = {path: {} for path in paths}
    for round_number in range(1, rounds + 1):
        for path, best in measured.items():
            probed = asdict(probe(threads, kernels))
            limits = {kind: max(limit, limits.get(kind, 0.0)) for kind, limit in probed.items()}
            for run, seconds in measure_runs(path, threads, repeat, FITTED + CHECKED).items():
                best[run] = min(seconds, best.get(run, seconds))
            print(f"{path.stem} is measured, round {round_number} of {rounds}", file=sys.stderr)
    return limits, measured


def models(folder: Path, only: str) -> Iterator[tuple[Path, bool]]:
    """Paths, made where they are not there yet; and whether their weights are random."""
    for kind in FORMATS:
        path = folder / f"SmolLM2-135M-{kind}.gguf"
        if only in path.name:
            yield made(path, "convert", str(resolve_model(None)), str(path), "--type", kind), False
    for shape, layers in SHAPES:
        path = folder / f"{shape}-q4_0.gguf"
        if only in path.name:
            cut = ["--layers", str(layers)] if layers else []
            yield made(path, "random", shape, str(path), "--type", "q4_0", *cut), True


def made(path: Path, *arguments: str) -> Path:
    if not path.exists():
        command = [sys.executable, "-c", "from jinn.cli.main import main; main()", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def check(
    path: Path, is_random: bool, known: Calibration, measured: dict[Run, float]
) -> tuple[Calibration, list[float]]:
    """Print predicted beside measured; the errors, and the calibration with the model's row."""
    shape, table, chunk = shape_of(str(path)), known.chips[0], DEFAULTS["max_num_batched_tokens"]
    chip = table.chip()
    before = closest(shape, table.name, known.efficiencies)
    start = before or find_efficiency(table.name, ENGINE, shape.architecture, shape.precision)
    row = fit(shape, chip, start, {run: measured[run] for run in FITTED}, chunk)
    errors = []
    for run in CHECKED:
        predicted = predict(shape, Machine(chip, row), run, chunk)
        errors.append(measured[run] / predicted - 1)
        line = f"{path.stem:<24} {run!s:<26} predicted {run.all_tokens / predicted:8,.1f}  measured "
        line += f"{run.all_tokens / measured[run]:8,.1f}  {errors[-1]:+6.1%}"
        if is_random and before is not None:
            blind = predict(shape, Machine(chip, before), run, chunk)
            line += f"  (by {before.source.split(' ')[0]}: {measured[run] / blind - 1:+.1%})"
        print(line, flush=True)
    efficiencies = with_row(known.efficiencies, row)
    return Calibration(chips=known.chips, efficiencies=efficiencies), errors


if __name__ == "__main__":
    sys.exit(main())
