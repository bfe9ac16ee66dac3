"""A model that is only its cache: each slot remembers, as read back from the blocks, all that came before it.

A wrong block, a forgotten copy or a block given to two sequences changes what follows, as in a real model.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from letters import LetterTokenizer

from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.drafting import Drafter
from jinn.engine.engine import Engine
from jinn.engine.messages import Abort, FinishReason, SamplingParams, StepOutput, Submit, TokenOutput
from jinn.engine.sampler import SampledToken, SampleRow, sample
from jinn.engine.scheduler import Chunk
from jinn.engine.sequence import Sequence
from jinn.ops.protocol import Batch

EOS = 0
MASK = 2**64 - 1


class FakeRunner:
    """`nan_id`: reading this token makes the sequence's logits NaN. `broken_id`: it makes the step raise.

    With `num_state_slots` the logits also depend on a recurrent state, which is wrong after a token too many.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int = 23,
        nan_id: int | None = None,
        broken_id: int | None = None,
        num_state_slots: int = 0,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.nan_id = nan_id
        self.broken_id = broken_id
        self.slots = np.zeros((num_blocks, block_size), np.uint64)
        self.batch_sizes: list[int] = []
        self.num_state_slots = num_state_slots
        self.states = [FakeState() for _ in range(num_state_slots)]

    def step(self, batch: Batch, rows: SequenceOf[SampleRow]) -> SequenceOf[SampledToken]:
        logits = self.logits(batch)
        if len(logits) != len(rows):
            raise ValueError("one row is needed for each logit row")
        return [sample(line, row) for line, row in zip(logits, rows, strict=True)]

    def logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        self.batch_sizes.append(len(batch.token_ids))
        if self.broken_id is not None and self.broken_id in batch.token_ids:
            raise RuntimeError("broken")
        wanted = set(batch.logit_rows.tolist())
        lines = []
        for index, blocks in enumerate(batch.block_tables.tolist()):
            start, stop = batch.query_start[index : index + 2].tolist()
            positions = batch.positions[start:stop].tolist()
            if positions[-1] + 1 != batch.context_lens[index]:
                raise ValueError("positions must end at the context's length")
            states = self._read_states(batch, index)
            for token, position, state in zip(range(start, stop), positions, states, strict=True):
                self._store(blocks, position, int(batch.token_ids[token]))
                if token in wanted:
                    lines.append(self._line(blocks, position, state))
        return np.stack(lines) if lines else np.empty((0, self.vocab_size), np.float32)

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        return self.logits(batch)

    def copy_block(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]

    def copy_state(self, source: int, target: int) -> None:
        self.states[target].value = self.states[source].value
        self.states[target].drafts = None

    def _read_states(self, batch: Batch, index: int) -> list[int]:
        """The state after each of the sequence's tokens; its slot takes in all but the drafts."""
        start, stop = batch.query_start[index : index + 2].tolist()
        if not self.num_state_slots:
            return [0] * (stop - start)
        slot = self.states[batch.state_slots[index]]
        tokens, num_drafts = batch.token_ids[start:stop].tolist(), int(batch.num_drafts[index])
        slot.take_in(int(batch.num_accepted[index]), is_first=batch.positions[start] == 0)
        values = list(accumulate(tokens, next_state, initial=slot.value))[1:]
        slot.value = [slot.value, *values][len(tokens) - num_drafts]
        slot.drafts = tokens[len(tokens) - num_drafts :]
        return values

    def _store(self, blocks: list[int], position: int, token_id: int) -> None:
        before = int(self._slot(blocks, position - 1)) if position else 1
        value = (before * 6364136223846793005 + token_id + 1) & MASK
        if before == MASK or token_id == self.nan_id:
            value = MASK  # poison: all that follows is lost
        self.slots[blocks[position // self.block_size], position % self.block_size] = value

    def _slot(self, blocks: list[int], position: int) -> np.uint64:
        return self.slots[blocks[position // self.block_size], position % self.block_size]

    def _line(self, blocks: list[int], position: int, recurrent: int) -> npt.NDArray[np.float32]:
        """Logits that depend on every slot up to `position`, and on the recurrent state."""
        context = self.slots[blocks].reshape(-1)[: position + 1]
        if context[-1] == MASK:
            return np.full(self.vocab_size, np.nan, np.float32)
        odd = np.arange(1, 2 * len(context), 2, dtype=np.uint64)
        digest = (context ^ (context >> np.uint64(29))) * odd
        state = np.bitwise_xor.reduce(digest * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(recurrent)
        line = (state + np.arange(self.vocab_size, dtype=np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        line = (line ^ (line >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        return ((line >> np.uint64(40)).astype(np.float32) / np.float32(2**21)) - np.float32(4)


@dataclass
class FakeState:
    """What a slot has taken in, and the drafts that it keeps aside; None where another's would be."""

    value: int = 0xDEAD
    drafts: list[int] | None = None

    def take_in(self, num_accepted: int, *, is_first: bool) -> None:
        if is_first:
            self.value = 1
        elif num_accepted:
            self.value = list(accumulate(self.drafts[:num_accepted], next_state, initial=self.value))[-1]
            if num_accepted > len(self.drafts):
                raise ValueError("more drafts were accepted than were kept aside")


def next_state(state: int, token_id: int) -> int:
    return (state * 0xD1342543DE82EF95 + token_id + 1) & MASK


class PoisonedBlocks(list[int]):
    """Free blocks, whose contents are overwritten so that reading one shows."""

    def __init__(self, blocks: list[int], slots: npt.NDArray[np.uint64]) -> None:
        super().__init__(blocks)
        self._slots = slots

    def append(self, block: int) -> None:
        self._slots[block] = 0xDEAD
        super().append(block)

    def extend(self, blocks: list[int]) -> None:
        for block in blocks:
            self.append(block)


def make_engine(
    runner: FakeRunner,
    drafter: Drafter | None = None,
    load_tokenizer: Callable[[], object] = LetterTokenizer,
    **settings: object,
) -> Engine:
    settings = {"max_model_len": min(64, runner.num_blocks * runner.block_size), **settings}
    info = ModelInfo(1 << 20, (EOS,), "fake", load_tokenizer=load_tokenizer)
    engine = Engine(runner, info, EngineConfig(model="fake", **settings), drafter)
    engine._cache._free = PoisonedBlocks(engine._cache._free, runner.slots)
    return engine


def run(engine: Engine, max_steps: int = 10_000) -> list[StepOutput]:
    """Step until nothing is left, checking the books each time."""
    steps = []
    while engine.has_work:
        if len(steps) == max_steps:
            raise AssertionError("the engine does not come to an end")
        steps.append(engine.step())
        engine.check_integrity()
    return steps


def collect(steps: list[StepOutput]) -> dict[tuple[str, int], list[TokenOutput]]:
    outputs: dict[tuple[str, int], list[TokenOutput]] = {}
    for step in steps:
        for output in step.outputs:
            outputs.setdefault((output.request_id, output.index), []).append(output)
    return outputs


def answer(outputs: list[TokenOutput]) -> tuple[object, ...]:
    """What a client sees of one choice: ids, float bits of the log-probabilities, why it ended, its error."""
    ids = tuple(token_id for output in outputs for token_id in output.token_ids)
    logprobs = tuple(
        (entry.logprob.hex(), tuple((i, value.hex()) for i, value in entry.top))
        for output in outputs
        for entry in output.logprobs
    )
    return ids, logprobs, outputs[-1].finish_reason, outputs[-1].error


def solo(request: Submit, index: int = 0, **runner_settings: object) -> tuple[object, ...]:
    """The answer of one choice, run alone by an engine of its own: the oracle."""
    seed = (request.sampling.seed or 0) + index
    sampling = replace(request.sampling, n=1, seed=seed)
    if runner_settings.get("num_state_slots"):
        runner_settings["num_state_slots"] = 64
    engine = make_engine(FakeRunner(64, 16, **runner_settings))
    engine.submit(replace(request, request_id="solo", tenant="solo", sampling=sampling))
    return answer(collect(run(engine))["solo", 0])


class PlantedDrafter:
    """Knows each answer beforehand: of `count` drafts the first `num_right` are right."""

    def __init__(self, requests: list[Submit], count: int, num_right: int, **runner_settings: object) -> None:
        self.count, self.num_right = count, num_right
        self.answers = {
            (request.request_id, index): solo(request, index, **runner_settings)[0]
            for request in requests
            for index in range(request.sampling.n)
        }

    def draft(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            said = len(sequence.output_ids)
            truth = self.answers[sequence.request_id, sequence.index][said : said + self.count]
            wrong = [(token_id + 1) % 23 for token_id in truth[self.num_right :]]
            sequence.drafts = (*truth[: self.num_right], *wrong)

    def forget(self, sequence: Sequence) -> None:
        sequence.drafts = ()


def random_requests(rng: random.Random, count: int, vocab_size: int = 23) -> list[Submit]:
    """Requests of two tenants that share prefixes of every length, among themselves and with each other."""
    family = [[rng.randrange(1, vocab_size) for _ in range(30)] for _ in range(2)]
    requests = []
    for number in range(count):
        prefix = rng.choice(family)[: rng.randrange(30)]
        prompt_ids = (*prefix, *(rng.randrange(1, vocab_size) for _ in range(rng.randrange(1, 6))))
        sampling = SamplingParams(
            n=rng.choice([1, 1, 1, 2, 4]),
            max_tokens=rng.randrange(1, 20),
            min_tokens=rng.choice([0, 0, 5]),
            temperature=rng.choice([0.0, 0.5, 1.5]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            logprobs=rng.choice([None, 0, 2]),
            stop_token_ids=rng.choice([(), (3,)]),
            ignore_eos=rng.random() < 0.3,
            seed=rng.randrange(1000),
        )
        requests.append(Submit(f"r{number}", f"tenant-{number % 2}", prompt_ids, sampling))
    return requests


def run_schedule(engine: Engine, requests: list[Submit], rng: random.Random) -> dict[tuple[str, int], object]:
    """Submit, abort and step in random order; the answers of all choices."""
    waiting, live, steps = list(requests), [], []
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.4:
            live.append(waiting.pop(0))
            engine.submit(live[-1])
        if live and rng.random() < 0.03:
            victim = rng.choice(live)
            engine.abort(Abort(victim.request_id, rng.choice([None, 0])))
        steps.append(engine.step())
        engine.check_integrity()
    return {key: answer(outputs) for key, outputs in collect(steps).items()}


def check_against_solo(
    requests: list[Submit], answers: dict[tuple[str, int], object], **runner_settings: object
) -> None:
    """Every choice has ended, and says what it says alone; one that was aborted, the beginning of it."""
    for request in requests:
        for index in range(request.sampling.n):
            ids, logprobs, reason, error = answers[request.request_id, index]
            solo_ids, solo_logprobs, solo_reason, solo_error = solo(request, index, **runner_settings)
            if reason is FinishReason.ABORT:
                solo_ids, solo_logprobs = solo_ids[: len(ids)], solo_logprobs[: len(logprobs)]
                solo_reason, solo_error = FinishReason.ABORT, None
            assert (ids, logprobs, reason, error) == (solo_ids, solo_logprobs, solo_reason, solo_error), (
                request
            )
