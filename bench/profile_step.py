"""Where the time of a step goes: by kind of stage, and in Python around it.

A stage is what threads compute between two barriers, or what one of them computes while the others wait.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter, thread_time
from typing import Any, get_args

import numpy as np

from jinn import _native
from jinn.engine.batch import pack, with_states
from jinn.engine.config import Activations, EngineConfig, ModelInfo
from jinn.engine.engine import Engine
from jinn.engine.loading import load_runner
from jinn.engine.messages import SamplingParams, Submit
from jinn.engine.runner import NativeRunner
from jinn.ops.protocol import Batch
from jinn.weights.model_store import resolve_model

SEQUENCES = (1, 32)  # that decode side by side while Python's part is timed
PROMPT_TOKENS, STEPS = 24, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a file, folder or pulled name; the packaged model without")
    parser.add_argument("--sequences", type=int, default=1, help="that a step computes")
    parser.add_argument("--tokens", type=int, default=1, help="of each sequence, that a step computes")
    parser.add_argument("--depth", type=int, default=64, help="tokens before them")
    parser.add_argument("--threads", type=int, default=_native.default_num_threads())
    parser.add_argument("--activations", default="auto", choices=get_args(Activations))
    parser.add_argument("--repeat", type=int, default=25, help="profiled steps, each after the one before")
    arguments = parser.parse_args()
    max_model_len = arguments.depth + arguments.tokens * arguments.repeat
    config = EngineConfig(
        str(resolve_model(arguments.model)),
        num_threads=arguments.threads,
        activations=arguments.activations,
        cache_memory=2**28,
        max_model_len=max(max_model_len, PROMPT_TOKENS + STEPS + 1),
    )
    runner, info = load_runner(config, lambda loaded, total: None)
    print_stages(runner, arguments.sequences, arguments.tokens, arguments.depth, arguments.repeat)
    for num_seqs in SEQUENCES:
        seconds, python_seconds = step_seconds(runner, info, config, num_seqs)
        print(f"a step of {num_seqs} sequences: {seconds * 1e3:.2f} ms, Python {python_seconds * 1e3:.3f} ms")


def print_stages(runner: NativeRunner, num_seqs: int, num_tokens: int, depth: int, repeat: int) -> None:
    """The median step, by kind of stage."""
    seq_blocks = -(-(depth + num_tokens * repeat) // runner.block_size)
    blocks = [np.arange(seq_blocks, dtype=np.int32) + seq_blocks * seq for seq in range(num_seqs)]
    if depth:
        for seq in range(num_seqs):
            runner.profile(next_tokens(runner, blocks, [seq], 0, depth))
    num_barriers, seqs = runner.num_barriers, list(range(num_seqs))
    starts = range(depth, depth + num_tokens * repeat, num_tokens)
    steps = [runner.profile(next_tokens(runner, blocks, seqs, start, num_tokens)) for start in starts]
    num_barriers = (runner.num_barriers - num_barriers) // repeat
    stages = sorted(steps, key=total)[repeat // 2]
    what = f"{num_seqs} x {num_tokens}" if num_seqs > 1 else str(num_tokens)
    print(f"{what} tokens after {depth}: {total(stages) * 1e3:.3f} ms, {num_barriers} barriers")
    seconds_by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for name, seconds in stages:
        seconds_by_kind[name].append(seconds)
    for name, each in sorted(seconds_by_kind.items(), key=lambda item: -sum(item[1])):
        print(f"{sum(each) * 1e3:9.3f} ms {sum(each) / total(stages):6.1%} {len(each):4} x {name}")


def total(stages: list[tuple[str, float]]) -> float:
    return sum(seconds for _, seconds in stages)


def next_tokens(
    runner: NativeRunner, blocks: list[np.ndarray], seqs: list[int], start: int, num_tokens: int
) -> Batch:
    """Random tokens of these sequences, each of whose last one's logits are wanted."""
    rng, num = np.random.default_rng(start), len(seqs)
    token_ids = [rng.integers(0, runner.vocab_size, num_tokens, np.int32) for _ in seqs]
    last_tokens = [num_tokens * (i + 1) - 1 for i in range(num)]
    batch = pack(token_ids, [start] * num, [blocks[seq] for seq in seqs], last_tokens)
    return with_states(batch, seqs, [0] * num, [0] * num) if runner.num_state_slots else batch


class NativeClock:
    """The caller's processor time in C++, of a runner's steps and draws from now on."""

    def __init__(self, runner: NativeRunner) -> None:
        self.seconds = 0.0
        self._run = partial(NativeRunner._run, runner)
        runner._run = self._timed_run

    def _timed_run(self, program: _native.Program, batch: Batch) -> NativeClock:
        self._logits = self._timed(self._run, program, batch)
        return self

    def sample(self, requests: list[_native.SampleRequest]) -> list[_native.Sampled]:
        """In the place of `Logits`, of which a step asks nothing else."""
        return self._timed(self._logits.sample, requests)

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        started = thread_time()
        result = function(*arguments)
        self.seconds += thread_time() - started
        return result


def step_seconds(
    runner: NativeRunner, info: ModelInfo, config: EngineConfig, num_seqs: int
) -> tuple[float, float]:
    """Of the median step in which so many sequences decode: all of it, and processor time in Python."""
    native = NativeClock(runner)
    engine = Engine(runner, info, config)
    sampling = SamplingParams(temperature=0.7, top_p=0.9, seed=0, max_tokens=STEPS, ignore_eos=True)
    rng = np.random.default_rng(num_seqs)
    for index in range(num_seqs):
        prompt_ids = tuple(rng.integers(0, runner.vocab_size, PROMPT_TOKENS).tolist())
        engine.submit(Submit(f"{index}", "profile", prompt_ids, sampling))
    times = []
    while engine.has_work:
        started, cpu_started, computed = perf_counter(), thread_time(), native.seconds
        engine.step()
        python_seconds = thread_time() - cpu_started - (native.seconds - computed)
        times.append((perf_counter() - started, python_seconds))
    whole, in_python = zip(*times[len(times) // 4 :], strict=True)  # prompts are read first
    return median(whole), median(in_python)


if __name__ == "__main__":
    main()
