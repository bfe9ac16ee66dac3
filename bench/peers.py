"""Runs jinn and its peers in turn on one file, and writes how fast each was and their ratios pair by pair.

    make bench-peers LLAMA_CPP=DIR            # the folder with llama-bench and llama-batched-bench
    python bench/peers.py model.gguf --pairs 7 --out build/peers

Conventions are llama-bench's: random tokens, prefill of 512, decode of 128, logits of a prompt's last token
only. The sequences that decode side by side are distinct (128 tokens in, 128 out each; no shared prompt). A
speed is the median of a run's repeats; a ratio is of two runs that followed each other. Absolute speeds drift
with whatever else a machine does, and ratios less; threads that wait for each other lose far more than
the CPU time that others take, so on a busy machine let each run wait for quiet: --wait 60 --tries 4.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any, Protocol

Speeds = dict[str, float]  # tokens per second by case

DECODED = 128
BATCH_DEPTH = 128  # of sequences that decode side by side
CPU_FEATURES = ("amx_int8", "avx512_vnni", "avx512_bf16", "avx_vnni", "avx2", "i8mm", "bf16", "sve")


@dataclass(frozen=True, slots=True)
class Workload:
    """What one run measures: decoding at a depth, by numbers of sequences, and a prompt where not 0."""

    prompt: int
    depth: int
    batch_sizes: tuple[int, ...]
    repeats: int

    def decode_case(self, num_seqs: int) -> str:
        return f"decode {DECODED} at depth {self.depth}, {num_seqs} sequence{'s' * (num_seqs > 1)}"


def workloads(prompt: int, depths: list[int], batch_sizes: list[int], repeats: int) -> list[Workload]:
    """A prompt and one sequence at the first depth, one sequence at the others, then several sequences."""
    first, *others = depths
    alone = [Workload(prompt, first, (1,), repeats), *(Workload(0, depth, (1,), repeats) for depth in others)]
    return alone + [Workload(0, BATCH_DEPTH, (num_seqs,), 1) for num_seqs in batch_sizes]


class Peer(Protocol):
    name: str
    settings: str

    def measure(self, workload: Workload) -> Speeds: ...


class Jinn:
    """`jinn bench`. `shares` is, by case, the share of its nearer limit that one token per second takes."""

    name = "jinn"

    def __init__(self, model: Path, threads: int) -> None:
        program = Path(sys.executable).with_name("jinn")
        self._command = [str(program), "bench", str(model), "--threads", str(threads), "--json"]
        self.settings = ""
        self.limits: dict[str, float] = {}
        self.shares: dict[str, tuple[float, str]] = {}

    def measure(self, workload: Workload) -> Speeds:
        options = {
            "prompt-tokens": workload.prompt or 1,
            "generate-tokens": DECODED,
            "depth": workload.depth,
            "batch": ",".join(map(str, workload.batch_sizes)),
            "repeat": workload.repeats,
        }
        report = json.loads(_run([*self._command, *(f"--{name}={value}" for name, value in options.items())]))
        self.settings = f"{report['isa']} kernels"
        for name, limit in report["limits"].items():
            self.limits[name] = max(limit, self.limits.get(name, 0.0))
        speeds = {workload.decode_case(n): report["decode_tok_s"][str(n)] for n in workload.batch_sizes}
        shares = {workload.decode_case(n): report["shares"]["decode"][str(n)] for n in workload.batch_sizes}
        if workload.prompt:
            prefill = f"prefill {workload.prompt}"
            speeds = {prefill: report["prefill_tok_s"]} | speeds
            shares[prefill] = report["shares"]["prefill"]
        for case, share in shares.items():
            self._note_share(case, share, speeds[case])
        return speeds

    def _note_share(self, case: str, share: Mapping[str, float], tok_s: float) -> None:
        """Keep the smallest, which comes from the probe that found the machine at its best."""
        limit = max(share, key=share.__getitem__)
        found = (share[limit] / tok_s, limit)
        self.shares[case] = min(self.shares.get(case, found), found)


class LlamaCpp:
    """`llama-bench`, and `llama-batched-bench` for several sequences."""

    name = "llama.cpp"

    def __init__(self, folder: Path, model: Path, threads: int) -> None:
        self._folder = folder
        self._common = ["-m", str(model), "-t", str(threads)]
        self._env = os.environ | {
            "LD_LIBRARY_PATH": f"{folder}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}"
        }
        self._can_repack = self._can_run_repacked()
        self.settings = (
            "repacked weights"
            if self._can_repack
            else "no repacking (with it, its AMX path stops with SIGILL here)"
        )

    def measure(self, workload: Workload) -> Speeds:
        if max(workload.batch_sizes) > 1:
            return self._side_by_side(workload)
        tests = ["-p", workload.prompt, "-n", DECODED, "-d", workload.depth, "-r", workload.repeats]
        results = json.loads(self._llama_bench(tests, is_repacked=self._can_repack).stdout)
        return {
            f"prefill {result['n_prompt']}" if result["n_prompt"] else workload.decode_case(1): median(
                result["samples_ts"]
            )
            for result in results
        }

    def _side_by_side(self, workload: Workload) -> Speeds:
        sizes = workload.batch_sizes
        context = max(sizes) * (workload.depth + DECODED)
        options = ["-npp", workload.depth, "-ntg", DECODED, "-npl", ",".join(map(str, sizes)), "-c", context]
        repack = "--repack" if self._can_repack else "--no-repack"
        output = ["--output-format", "jsonl", repack]
        program = str(self._folder / "llama-batched-bench")
        lines = _run([program, *self._common, *map(str, options), *output], self._env).splitlines()
        results = [json.loads(line) for line in lines if line.startswith("{")]
        return {workload.decode_case(result["pl"]): result["speed_tg"] for result in results}

    def _can_run_repacked(self) -> bool:
        found = self._llama_bench(["-p", 16, "-n", 1, "-r", 1], is_repacked=True, check=False)
        if found.returncode not in (0, -signal.SIGILL):
            raise RuntimeError(f"llama-bench failed: {found.stderr.strip()[-300:]}")
        return found.returncode == 0

    def _llama_bench(
        self, options: Iterable[object], *, is_repacked: bool, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        program = str(self._folder / "llama-bench")
        command = [
            program,
            *self._common,
            *map(str, options),
            "-o",
            "json",
            "--repack",
            str(int(is_repacked)),
        ]
        return subprocess.run(command, env=self._env, capture_output=True, text=True, check=check)


class Transformers:
    """transformers in bfloat16 on a folder of the same weights; one sequence only."""

    name = "transformers"
    settings = "bfloat16, logits of the last token only"

    def __init__(self, folder: Path, threads: int) -> None:
        self._command = [sys.executable, str(Path(__file__).with_name("transformers_speed.py")), str(folder)]
        self._command += ["--threads", str(threads), "--decode", str(DECODED)]

    def measure(self, workload: Workload) -> Speeds:
        sizes = {"prompt": workload.prompt, "depth": workload.depth, "repeats": workload.repeats}
        options = (f"--{name}={value}" for name, value in sizes.items())
        found = json.loads(_run([*self._command, *options]))
        speeds = {f"prefill {workload.prompt}": median(found["prefill"])} if workload.prompt else {}
        return speeds | {workload.decode_case(1): median(found["decode"])}


def _run(command: list[str], env: Mapping[str, str] | None = None) -> str:
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


@dataclass(frozen=True, slots=True)
class Sample:
    """One run's speeds, and the share of all CPU time that other processes took meanwhile."""

    speeds: Speeds
    others: float


@dataclass(frozen=True, slots=True)
class Quiet:
    """How a run avoids others: it waits for a quiet second, and is run again where they came back."""

    share: float  # of all CPUs; others that take less disturb nothing
    tries: int
    wait: float  # seconds at most before a try

    def run(self, measure: Callable[[], Speeds]) -> Sample:
        """The first undisturbed run, else the least disturbed."""
        samples: list[Sample] = []
        while len(samples) < self.tries and all(sample.others > self.share for sample in samples):
            self._wait()
            samples.append(_sample(measure))
        return min(samples, key=lambda sample: sample.others)

    def _wait(self) -> None:
        deadline = monotonic() + self.wait
        while monotonic() < deadline and _sample(_one_second).others > self.share:
            pass


def _one_second() -> Speeds:
    sleep(1)
    return {}


def _sample(measure: Callable[[], Speeds]) -> Sample:
    busy, own, started = _busy_seconds(), _children_seconds(), monotonic()
    speeds = measure()
    others = _busy_seconds() - busy - (_children_seconds() - own)
    return Sample(speeds, max(0.0, others / (monotonic() - started) / (os.cpu_count() or 1)))


def _busy_seconds() -> float:
    """Of all CPUs together, since the machine started: user, nice, system, irq, softirq and steal."""
    ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(ticks[i]) for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def alternate(
    peers: list[Peer], chosen: list[Workload], num_pairs: int, quiet: Quiet
) -> dict[str, list[list[Sample]]]:
    """By peer and workload, a sample of each pair. Peers take turns at each workload."""
    samples: dict[str, list[list[Sample]]] = {peer.name: [[] for _ in chosen] for peer in peers}
    for pair in range(num_pairs):
        for which, workload in enumerate(chosen):
            for peer in peers:
                sample = quiet.run(partial(peer.measure, workload))
                samples[peer.name][which].append(sample)
                speeds = ", ".join(f"{case} {tok_s:.1f}" for case, tok_s in sample.speeds.items())
                print(f"pair {pair + 1}: {peer.name}: {speeds} (others {sample.others:.0%})", file=sys.stderr)
    return samples


def by_case(samples: list[list[Sample]]) -> dict[str, list[float]]:
    """Tokens per second of each pair's run, by case."""
    return {
        case: [sample.speeds[case] for sample in of_workload]
        for of_workload in samples
        for case in of_workload[0].speeds
    }


def summary(jinn: Jinn, speeds: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """One row for each case and peer, jinn first."""
    rows = []
    for case, ours in speeds[jinn.name].items():
        share, limit = jinn.shares[case]
        for name, by_pair in speeds.items():
            theirs = by_pair[case]
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            rows.append(
                {
                    "case": case,
                    "engine": name,
                    "tok_s": median(theirs),
                    "spread": (max(theirs) - min(theirs)) / median(theirs),
                    "share": median(theirs) * share,
                    "limit": limit,
                    "jinn_ratio": median(ratios),
                    "jinn_ratio_range": [min(ratios), max(ratios)],
                }
            )
    return rows


def machine() -> dict[str, Any]:
    """What kind of machine this is, without its name."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "cpu": info.get("model name", platform.machine()),
        "family_model": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "features": [feature for feature in CPU_FEATURES if feature in flags],
        "cpus": os.cpu_count(),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a table with what was run above it and below it."""
    about, limits = report["machine"], report["limits"]
    lines = [
        f"`{report['model']}`, {report['threads']} threads, {report['pairs']} pairs; {about['cpu']} "
        f"(family/model {about['family_model']}; {', '.join(about['features'])}), {about['cpus']} CPUs.",
        "",
        "| case | engine | tokens/s, median | spread | of its limit | jinn is faster by, median (range) |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        low, high = row["jinn_ratio_range"]
        ratio = "" if row["engine"] == "jinn" else f"**{row['jinn_ratio']:.2f}×** ({low:.2f}–{high:.2f})"
        lines.append(
            f"| {row['case']} | {row['engine']} | {row['tok_s']:.0f} | {row['spread']:.0%} "
            f"| {row['share']:.0%} of {row['limit']} | {ratio} |"
        )
    lines += [f"| all | {name} | not run | | | |" for name in report["not_run"]]
    lines += [
        "",
        *(f"* {name}: {settings}" for name, settings in report["settings"].items()),
        f"* limits, best probe: reads {limits['read_bandwidth'] / 1e9:.1f} GB/s; "
        + ", ".join(f"{kind} {limits[kind] / 1e12:.2f} Top/s" for kind in ("int8", "bf16", "f32")),
        f"* CPU time that other processes took during a run: {report['others']:.0%} median",
    ]
    return "\n".join(lines) + "\n"


def _numbers(text: str) -> list[int]:
    return [] if text == "none" else [int(number) for number in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", type=Path, help="a .gguf file; without one, the packaged SmolLM2-135M"
    )
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=os.environ.get("LLAMA_CPP") or None,
        metavar="DIR",
        help="llama.cpp's programs (default: $LLAMA_CPP)",
    )
    parser.add_argument(
        "--transformers",
        type=Path,
        metavar="FOLDER",
        help="the same weights; needs --batches none",
    )
    parser.add_argument("--pairs", type=int, default=5, help="runs of each engine (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument(
        "--depths", type=_numbers, default=[0, 512], help="of one sequence that decodes (default: 0,512)"
    )
    parser.add_argument(
        "--batches", type=_numbers, default=[16, 32], help="sequences side by side (default: 16,32; or none)"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="of one sequence, in a run (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2, help="of each engine (default: %(default)s)")
    parser.add_argument(
        "--tries", type=int, default=1, help="runs at most until others disturb none (default: %(default)s)"
    )
    parser.add_argument(
        "--wait", type=float, default=0, help="seconds at most for quiet before each (default: %(default)s)"
    )
    parser.add_argument(
        "--quiet", type=float, default=0.05, help="share of the CPUs that disturbs not (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/peers"),
        help="writes OUT.md and OUT.json (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    from jinn.weights.model_store import resolve_model

    options = parse_arguments()
    if options.transformers and options.batches:
        raise SystemExit("transformers decodes one sequence here: use --batches none")
    model = resolve_model(str(options.model) if options.model else None)
    jinn = Jinn(model, options.threads)
    peers: list[Peer] = [jinn]
    has_llama_cpp = options.llama_cpp and (options.llama_cpp / "llama-bench").exists()
    if has_llama_cpp:
        peers.append(LlamaCpp(options.llama_cpp.resolve(), model, options.threads))
    if options.transformers:
        peers.append(Transformers(options.transformers, options.threads))
    quiet = Quiet(options.quiet, options.tries, options.wait)
    chosen = workloads(options.prompt, options.depths, options.batches, options.repeats)
    samples = alternate(peers, chosen, options.pairs, quiet)
    report = {
        "model": model.name,
        "threads": options.threads,
        "pairs": options.pairs,
        "machine": machine(),
        "settings": {peer.name: peer.settings for peer in peers},
        "not_run": [kind.name for kind in (LlamaCpp, Transformers) if kind.name not in samples],
        "limits": jinn.limits,
        "others": median(s.others for by_workload in samples.values() for runs in by_workload for s in runs),
        "rows": summary(jinn, {name: by_case(by_workload) for name, by_workload in samples.items()}),
        "samples": {
            name: [[asdict(sample) for sample in runs] for runs in by_workload]
            for name, by_workload in samples.items()
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report), end="")


if __name__ == "__main__":
    main()
