"""`jinn bench`: how fast a model runs here, and how near that is to what the machine can do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jinn.cli.inspect import kv_block_bytes, kv_bytes_per_token
from jinn.cli.options import DEFAULTS, ModelArgument, ThreadsOption
from jinn.cli.progress import progress_bar
from jinn.sizes import format_size

if TYPE_CHECKING:
    from jinn.engine.benchmark import Benchmark, Limits
    from jinn.models.costs import Costs


@dataclass(frozen=True, slots=True)
class Workload:
    """What to time. Raises ValueError naming the option."""

    prompt_tokens: int
    generate_tokens: int
    depth: int
    batch_sizes: tuple[int, ...]
    repeat: int

    def __post_init__(self) -> None:
        for name, value, low in (
            ("prompt-tokens", self.prompt_tokens, 1),
            ("generate-tokens", self.generate_tokens, 1),
            ("depth", self.depth, 0),
            ("batch", min(self.batch_sizes), 1),
            ("repeat", self.repeat, 1),
        ):
            if value < low:
                raise ValueError(f"--{name} must be at least {low}, not {value}")

    @property
    def max_len(self) -> int:
        return max(self.prompt_tokens, self.depth + self.generate_tokens)


def bench(
    model: ModelArgument = None,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the prompt to read.")] = 512,
    generate_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate.")] = 128,
    depth: Annotated[int, typer.Option(metavar="N", help="Tokens in the cache before generating.")] = 0,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Sequences to generate side by side.")] = "1,8,32",
    threads: ThreadsOption = None,
    repeat: Annotated[int, typer.Option(metavar="N", help="Runs of each; their median counts.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure prefill and decode, and the machine's own limits.

    As in llama-bench, tokens are random and only the last one of a prompt gets logits. The times contain the
    kernels and the greedy draw of the next token.
    """
    from jinn.weights.model_store import resolve_model

    workload = Workload(prompt_tokens, generate_tokens, depth, _batch_sizes(batch), repeat)
    report = measure(resolve_model(model), workload, threads)
    print(json.dumps(report) if as_json else format_report(report))


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--batch must be numbers with commas between, not {text!r}") from None


def measure(path: Path, workload: Workload, threads: int | None) -> dict[str, Any]:
    """Rates in tokens, operations or bytes per second; shares are of 1."""
    from statistics import median

    from jinn import _native, env
    from jinn.engine.benchmark import probe
    from jinn.models.costs import costs
    from jinn.models.registry import model_of
    from jinn.weights.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        model = model_of(checkpoint)
        model_costs = costs(model, checkpoint)
    if workload.max_len > model.max_position_embeddings:
        raise ValueError(
            f"{workload.max_len} tokens are more than the model's {model.max_position_embeddings}"
        )
    num_threads = threads or _native.default_num_threads()
    kernels = _native.choose_kernels(env.isa() or "")
    limits = probe(num_threads, kernels)
    times = _time(path, workload, num_threads)
    shares = Shares(limits, model_costs, kv_bytes_per_token(model, DEFAULTS["kv_cache_dtype"]))
    return {
        "model": path.name,
        "weight_bytes": model_costs.weight_bytes,
        "threads": num_threads,
        "isa": kernels.name,
        **asdict(workload),
        "prefill_tok_s": median(times.prefill_tok_s),
        "decode_tok_s": {size: median(rates) for size, rates in times.decode_tok_s.items()},
        "samples": asdict(times),
        "limits": asdict(limits),
        "shares": {
            "prefill": shares.prefill(workload.prompt_tokens, median(times.prefill_tok_s)),
            "decode": {
                size: shares.decode(int(size), workload, median(rates))
                for size, rates in times.decode_tok_s.items()
            },
        },
    }


@dataclass(frozen=True, slots=True)
class Times:
    """Tokens per second of each run; of all sequences together, by their number."""

    prefill_tok_s: list[float]
    decode_tok_s: dict[str, list[float]]


def load_benchmark(path: Path, num_seqs: int, max_len: int, num_threads: int) -> Benchmark:
    """Load the model, with a cache for `num_seqs` sequences of `max_len` tokens."""
    from jinn.engine.benchmark import Benchmark, num_blocks
    from jinn.engine.config import EngineConfig
    from jinn.engine.loading import load_runner, state_slot_bytes
    from jinn.models.registry import model_of
    from jinn.weights.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        model = model_of(checkpoint)
    blocks = num_blocks(num_seqs, max_len, DEFAULTS["block_size"])
    state_memory = num_seqs * state_slot_bytes(model, num_drafts=0)
    cache_memory = blocks * kv_block_bytes(model, DEFAULTS["kv_cache_dtype"]) + state_memory
    config = EngineConfig(
        str(path), num_threads=num_threads, cache_memory=cache_memory, state_memory=state_memory or None
    )
    with progress_bar("Loading", is_bytes=True) as on_load:
        runner, _ = load_runner(config, on_load)
    return Benchmark(runner, num_seqs, max_len, config.max_num_batched_tokens)


def _time(path: Path, workload: Workload, num_threads: int) -> Times:
    """Load the model and run each measurement once to warm up, then as often as asked."""
    benchmark = load_benchmark(path, max(workload.batch_sizes), workload.max_len, num_threads)

    def rates(num_tokens: int, seconds: Callable[[], float]) -> list[float]:
        seconds()
        return [num_tokens / seconds() for _ in range(workload.repeat)]

    def decode_seconds(num_seqs: int) -> float:
        return sum(benchmark.decode_seconds(num_seqs, generated, workload.depth))

    prompt, generated = workload.prompt_tokens, workload.generate_tokens
    return Times(
        rates(prompt, partial(benchmark.prefill_seconds, prompt)),
        {str(size): rates(size * generated, partial(decode_seconds, size)) for size in workload.batch_sizes},
    )


@dataclass(frozen=True, slots=True)
class Shares:
    """What of the bandwidth, and of the arithmetic, a speed makes use of."""

    limits: Limits
    costs: Costs
    kv_bytes_per_token: int

    def prefill(self, num_tokens: int, tok_s: float) -> dict[str, float]:
        num_steps = -(-num_tokens // DEFAULTS["max_num_batched_tokens"])
        operations = self.costs.operations(num_tokens, num_tokens, 1)
        return self._of(num_steps * self.costs.weight_bytes, operations, num_tokens / tok_s)

    def decode(self, num_seqs: int, workload: Workload, tok_s: float) -> dict[str, float]:
        """Of a step at the mean context."""
        context_len = workload.depth + (workload.generate_tokens + 1) // 2
        num_bytes = self.costs.weight_bytes + num_seqs * context_len * self.kv_bytes_per_token
        operations = self.costs.operations(1, context_len, 1)
        return self._of(num_bytes, {kind: num_seqs * n for kind, n in operations.items()}, num_seqs / tok_s)

    def _of(self, num_bytes: float, operations: Mapping[str, float], seconds: float) -> dict[str, float]:
        return {
            "bandwidth": num_bytes / self.limits.read_bandwidth / seconds,
            "compute": self.limits.seconds(operations) / seconds,
        }


def format_report(report: dict[str, Any]) -> str:
    """The report for people."""
    rows = [("", "tokens/s", "of bandwidth", "of compute")]
    after = f" at depth {report['depth']}" if report["depth"] else ""
    speeds = [(f"prefill {report['prompt_tokens']}", report["prefill_tok_s"], report["shares"]["prefill"])]
    for size, tok_s in report["decode_tok_s"].items():
        name = f"decode {report['generate_tokens']}{after}, batch {size}"
        speeds.append((name, tok_s, report["shares"]["decode"][size]))
    rows += [
        (name, f"{tok_s:.1f}", f"{share['bandwidth']:.0%}", f"{share['compute']:.0%}")
        for name, tok_s, share in speeds
    ]
    width = max(len(row[0]) for row in rows)
    limits = report["limits"]
    return "\n".join(
        [
            f"{report['model']}: {format_size(report['weight_bytes'])} read per step, "
            f"{report['threads']} threads, {report['isa']}",
            *(f"{name:<{width}}  {tok_s:>9}  {of_b:>12}  {of_c:>10}" for name, tok_s, of_b, of_c in rows),
            f"limits: reads {limits['read_bandwidth'] / 1e9:.1f} GB/s; "
            + ", ".join(f"{kind} {limits[kind] / 1e12:.2f} Top/s" for kind in ("int8", "bf16", "f32")),
        ]
    )
