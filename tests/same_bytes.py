"""'Same bytes': random schedules on a real engine, each answer compared with the request run alone.

A schedule is a function of its seed: what arrives when, who is cancelled, and how the engine is set up (chunk
sizes, cache size and type, threads, instruction set). `check_schedule(model, seed)` runs it and compares ids
and float bits of log-probabilities with those of the request run alone, by a fresh engine with a roomy cache
and one thread. Nothing is rerun: one differing bit is a failure, which names the seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from random import Random
from unittest.mock import patch

from jinn import _native
from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.engine import Engine
from jinn.engine.loading import load_runner
from jinn.engine.messages import Abort, FinishReason, SamplingParams, Submit, TokenOutput
from jinn.engine.runner import Runner
from jinn.engine.scheduler import Chunk
from jinn.engine.sequence import Sequence as EngineSequence

MAX_STEPS = 20_000
MAX_CHECKED = 12  # choices of a schedule; the others are their company
BLOCK_SIZE = 16


class DifferentBytesError(AssertionError):
    """A choice's bytes are not those of its request run alone."""


@dataclass(frozen=True)
class Kernels:
    """What the bytes of an answer may depend on besides the request and the weights; and the thread count."""

    isa: str
    kv_cache_dtype: str
    activations: str
    num_threads: int = 1


Load = Callable[[Kernels], tuple[Runner, ModelInfo]]


@dataclass(frozen=True)
class Sizes:
    """How large the requests of a model's schedules are."""

    vocab_size: int
    num_requests: tuple[int, ...]  # one of these
    max_prompt: int
    max_tokens: int
    num_tokens: int = 4000  # of all prompts of a schedule together, at most
    num_steps: int = 400  # that reading these prompts may take
    adapters: tuple[str | None, ...] = (None,)  # a request goes through one of these


@dataclass(frozen=True)
class Model:
    """A model to run schedules on. `load` gives a runner, whose contents a fresh engine need not trust."""

    load: Load
    sizes: Sizes


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it comes, and after how many steps it, or a choice, is cancelled."""

    step: int
    submit: Submit
    cancel_after: int | None = None
    cancelled_index: int | None = None


@dataclass(frozen=True)
class Schedule:
    kernels: Kernels
    arrivals: tuple[Arrival, ...]  # by step
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    num_blocks: int  # at least what `max_model_len` takes
    num_state_slots: int  # for models with recurrent states
    num_drafts: int  # guessed at random at a time, so nearly all are wrong; 0: none


@dataclass
class Report:
    """What schedules came across, to show that a sweep met what it is for."""

    num_choices: int = 0
    num_cancelled: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    row_counts: set[int] = field(default_factory=set)
    chunk_sizes: set[int] = field(default_factory=set)
    kernels: set[Kernels] = field(default_factory=set)

    def add(self, other: Report) -> None:
        self.num_choices += other.num_choices
        self.num_cancelled += other.num_cancelled
        self.num_preemptions += other.num_preemptions
        self.num_cached_tokens += other.num_cached_tokens
        self.num_draft_tokens += other.num_draft_tokens
        self.row_counts |= other.row_counts
        self.chunk_sizes |= other.chunk_sizes
        self.kernels |= other.kernels


def native_model(
    path: str,
    sizes: Sizes,
    cache_memory: int,
    num_kept: int,
    lora_adapters: Mapping[str, str] | None = None,
) -> Model:
    """The file's model on the native kernels; the `num_kept` runners used last stay loaded."""

    @lru_cache(maxsize=num_kept)
    def load(kernels: Kernels) -> tuple[Runner, ModelInfo]:
        config = EngineConfig(
            path,
            num_threads=kernels.num_threads,
            cache_memory=cache_memory,
            kv_cache_dtype=kernels.kv_cache_dtype,
            activations=kernels.activations,
            block_size=BLOCK_SIZE,
            speculative="ngram",
            lora_adapters=lora_adapters or {},
        )
        with patch.dict(os.environ, {"JINN_ISA": kernels.isa}):
            return load_runner(config, lambda loaded, total: None)

    return Model(load, sizes)


def check_schedule(model: Model, seed: int) -> Report:
    """Run schedule `seed`. Raises DifferentBytesError, or what the engine's own checks raise."""
    schedule = random_schedule(seed, model.sizes)
    report = Report(chunk_sizes={schedule.max_num_batched_tokens}, kernels={schedule.kernels})
    outputs = run_schedule(model, schedule, report)
    oracle = Oracle(model, replace(schedule.kernels, num_threads=1), schedule.max_model_len)
    choices = [(a, index) for a in schedule.arrivals for index in range(a.submit.sampling.n)]
    for arrival, index in Random(seed).sample(choices, min(len(choices), MAX_CHECKED)):
        request_id = arrival.submit.request_id
        mine = outputs[request_id, index]
        compare(f"schedule {seed}, request {request_id}[{index}]", mine, oracle, arrival, index)
        report.num_choices += 1
        report.num_cancelled += mine[-1].finish_reason is FinishReason.ABORT
    return report


def compare(name: str, mine: Sequence[TokenOutput], oracle: Oracle, arrival: Arrival, index: int) -> None:
    """Raise unless the choice's bytes are the oracle's, or their beginning where it was cancelled."""
    alone = oracle.answer(arrival.submit, index)
    is_cancelled = mine[-1].finish_reason is FinishReason.ABORT and arrival.cancel_after is not None
    ends = mine[-1].finish_reason, alone[-1].finish_reason
    if not is_cancelled and ends[0] is not ends[1]:
        raise DifferentBytesError(f"{name} ended by {ends[0]}, alone by {ends[1]}")
    got, expected = answer_bytes(mine), answer_bytes(alone)
    if is_cancelled:
        expected = expected[: len(got)]
    if got != expected:
        place = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(got))
        raise DifferentBytesError(f"{name} differs from the request run alone at output token {place}")


def answer_bytes(outputs: Sequence[TokenOutput]) -> list[tuple[object, ...]]:
    """Per output token: its id, and the exact log-probabilities where asked for."""
    ids = [token_id for output in outputs for token_id in output.token_ids]
    logprobs = [
        (entry.logprob.hex(), tuple((token_id, value.hex()) for token_id, value in entry.top))
        for output in outputs
        for entry in output.logprobs
    ]
    if not logprobs:
        return [(token_id,) for token_id in ids]
    return list(zip(ids, logprobs, strict=True))


class Oracle:
    """Answers of requests run alone: each by a fresh engine, one thread, a roomy cache."""

    def __init__(self, model: Model, kernels: Kernels, max_model_len: int) -> None:
        self._runner, self._info = model.load(kernels)
        self._config = EngineConfig("alone", max_model_len=max_model_len)

    def answer(self, submit: Submit, index: int) -> list[TokenOutput]:
        """The outputs of choice `index`: those of its own seed alone."""
        sampling = submit.sampling
        single = replace(sampling, n=1, seed=(sampling.seed or 0) + index)
        engine = Engine(self._runner, self._info, self._config)
        engine.submit(replace(submit, request_id="alone", tenant="alone", sampling=single))
        outputs: list[TokenOutput] = []
        while engine.has_work:
            outputs += engine.step().outputs
        return outputs


class SmallerCache:
    """A runner of which only the first blocks, and the first slots, are used."""

    def __init__(self, runner: Runner, num_blocks: int, num_state_slots: int) -> None:
        if num_blocks > runner.num_blocks:
            raise ValueError(f"the runner has {runner.num_blocks} blocks, not {num_blocks}")
        self.vocab_size, self.num_blocks, self.block_size = runner.vocab_size, num_blocks, runner.block_size
        self.num_state_slots = min(runner.num_state_slots, num_state_slots)
        self.step, self.logits, self.copy_block = runner.step, runner.logits, runner.copy_block
        self.copy_state, self.predict, self.last_hidden = (
            runner.copy_state,
            runner.predict,
            runner.last_hidden,
        )
        self.hidden_states = runner.hidden_states


class RandomDrafter:
    """Guesses that know nothing."""

    def __init__(self, num_tokens: int, vocab_size: int) -> None:
        self._num_tokens, self._vocab_size = num_tokens, vocab_size
        self._rng = Random(0)

    def draft(self, chunks: Sequence[Chunk]) -> None:
        """See `Drafter`."""
        for chunk in chunks:
            count = self._rng.randint(0, self._num_tokens)
            chunk.sequence.drafts = tuple(self._rng.randrange(self._vocab_size) for _ in range(count))

    def forget(self, sequence: EngineSequence) -> None:
        """See `Drafter`."""
        sequence.drafts = ()


def run_schedule(
    model: Model, schedule: Schedule, report: Report
) -> dict[tuple[str, int], list[TokenOutput]]:
    """Every choice's outputs, by request id and index. The cache's books are checked after each step."""
    runner, info = model.load(schedule.kernels)
    config = EngineConfig(
        "schedule",
        max_model_len=schedule.max_model_len,
        max_num_seqs=schedule.max_num_seqs,
        max_num_batched_tokens=schedule.max_num_batched_tokens,
        max_step_ms=1e6,  # chunks must not depend on the clock, or a seed would not reproduce a failure
    )
    cache = SmallerCache(runner, schedule.num_blocks, schedule.num_state_slots)
    drafter = RandomDrafter(schedule.num_drafts, model.sizes.vocab_size) if schedule.num_drafts else None
    engine = Engine(cache, info, config, drafter)
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    waiting = list(schedule.arrivals)
    cancels: list[tuple[int, Abort]] = []
    step = 0
    while waiting or engine.has_work:
        while waiting and (waiting[0].step <= step or not engine.has_work):
            arrival = waiting.pop(0)
            engine.submit(arrival.submit)
            if arrival.cancel_after is not None:
                abort = Abort(arrival.submit.request_id, arrival.cancelled_index)
                cancels.append((step + arrival.cancel_after, abort))
        for _, abort in [cancel for cancel in cancels if cancel[0] == step]:
            engine.abort(abort)
        result = engine.step()
        for output in result.outputs:
            outputs.setdefault((output.request_id, output.index), []).append(output)
        report.row_counts.add(sum(bool(output.token_ids) for output in result.outputs))
        engine.check_integrity()
        step += 1
        if step > MAX_STEPS:
            raise AssertionError("the schedule does not come to an end")
    report.num_preemptions += engine.stats.num_preemptions
    report.num_cached_tokens += engine.stats.num_cached_tokens
    report.num_draft_tokens += engine.stats.num_draft_tokens
    if engine.stats.num_used_blocks:
        raise AssertionError(f"{engine.stats.num_used_blocks} blocks are held by nobody")
    return outputs


def random_schedule(seed: int, sizes: Sizes) -> Schedule:
    """The same for the same seed."""
    rng, adapters = Random(seed), Random(seed)
    count = rng.choice(sizes.num_requests)
    chunk = rng.choice((1, 7, 64, 512))
    length = max(min(sizes.max_prompt, min(sizes.num_tokens, sizes.num_steps * chunk) // count), 1)
    prefixes = [_random_ids(rng, sizes, rng.randint(0, length)) for _ in range(3)]
    prompts = [_random_prompt(rng, sizes, prefixes, length) for _ in range(count)]
    submits = [
        Submit(
            f"r{i}",
            rng.choice(("red", "blue")),
            prompt,
            _sampling(rng, sizes, is_crowded=count > 9),
            turn_starts=tuple(
                sorted(rng.sample(range(len(prompt) + 1), rng.randint(0, min(len(prompt), 5))))
            ),
            adapter=adapters.choice(sizes.adapters),
        )
        for i, prompt in enumerate(prompts)
    ]
    spread = rng.choice((0, 0, 3, 40))  # 0: all at once
    arrivals = sorted((_arrival(rng, submit, spread) for submit in submits), key=lambda arrival: arrival.step)
    longest = max(len(s.prompt_ids) + (s.sampling.max_tokens or 0) for s in submits)
    num_blocks = -(-longest // BLOCK_SIZE)
    return Schedule(
        kernels=Kernels(
            isa=rng.choice(_native.isa_names()),
            kv_cache_dtype=rng.choice(("bf16", "int8", "f32")),
            activations=rng.choice(("int12", "mixed", "int8", "bf16", "f32")),
            num_threads=rng.choice((1, 2)),
        ),
        arrivals=tuple(arrivals),
        max_num_batched_tokens=chunk,
        max_num_seqs=rng.choice((4, 65, 65, 65) if count > 9 else (1, 4, 65)),
        max_model_len=longest,
        num_blocks=num_blocks + rng.choice((0, 1, num_blocks, 300, 300)),
        num_state_slots=rng.choice((1, 2, 5, 20, 200)),
        num_drafts=rng.choice((0, 0, 1, 4)),
    )


def _arrival(rng: Random, submit: Submit, spread: int) -> Arrival:
    step = rng.randint(0, spread)
    if rng.random() < 0.8:
        return Arrival(step, submit)
    index = rng.randrange(submit.sampling.n) if rng.random() < 0.5 else None
    return Arrival(step, submit, rng.randint(0, 30), index)


def _random_ids(rng: Random, sizes: Sizes, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(sizes.vocab_size) for _ in range(count))


def _random_prompt(
    rng: Random, sizes: Sizes, prefixes: list[tuple[int, ...]], length: int
) -> tuple[int, ...]:
    """A prefix that others may have too, cut anywhere or whole, and ids of its own or none."""
    prefix = rng.choice(prefixes)
    kept = rng.choice((len(prefix), rng.randint(0, len(prefix))))
    own = rng.randint(0 if kept else 1, max(length - kept, 1))
    return prefix[:kept] + _random_ids(rng, sizes, rng.choice((own, min(own, 2), 0 if kept else own)))


def _sampling(rng: Random, sizes: Sizes, is_crowded: bool) -> SamplingParams:
    """Greedy or drawn, with any filters and penalties; nearly all ask for log-probabilities."""
    return SamplingParams(
        n=rng.choice((1, 1, 1, 1, 4)),
        max_tokens=rng.randint(sizes.max_tokens // 2 if is_crowded else 1, sizes.max_tokens),
        min_tokens=rng.choice((0, 0, 3)),
        temperature=rng.choice((0.0, 0.7, 1.0, 1.5)),
        top_k=rng.choice((0, 0, 5, 40)),
        top_p=rng.choice((1.0, 1.0, 0.9)),
        min_p=rng.choice((0.0, 0.0, 0.05)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.2)),
        presence_penalty=rng.choice((0.0, 0.0, 0.5)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.3)),
        logit_bias={rng.randrange(sizes.vocab_size): 2.0} if rng.random() < 0.2 else {},
        logprobs=rng.choice((None, 0, 3, 20)),
        stop_token_ids=(rng.randrange(sizes.vocab_size),) if rng.random() < 0.3 else (),
        ignore_eos=rng.random() < 0.5,
        seed=rng.randrange(2**62),
    )
