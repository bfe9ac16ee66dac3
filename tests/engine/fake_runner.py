"""A model that is only its cache: each slot remembers, as read back from the blocks, all that came before it.

A wrong block, a forgotten copy or a block given to two sequences changes what follows, as it would in a real model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.engine import Engine
from jinn.engine.messages import StepOutput, Submit, TokenOutput
from jinn.engine.sampler import SampledToken, SampleRow, sample
from jinn.ops.protocol import Batch

EOS = 0
MASK = 2**64 - 1


class FakeRunner:
    """`nan_id`: reading this token makes the sequence's logits NaN. `broken_id`: it makes the step raise."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int = 23,
        nan_id: int | None = None,
        broken_id: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.nan_id = nan_id
        self.broken_id = broken_id
        self.slots = np.zeros((num_blocks, block_size), np.uint64)
        self.batch_sizes: list[int] = []

    def step(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
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
            for token, position in zip(range(start, stop), positions, strict=True):
                self._store(blocks, position, int(batch.token_ids[token]))
                if token in wanted:
                    lines.append(self._line(blocks, position))
        return np.stack(lines) if lines else np.empty((0, self.vocab_size), np.float32)

    def copy_block(self, source: int, target: int) -> None:
        self.slots[target] = self.slots[source]

    def _store(self, blocks: list[int], position: int, token_id: int) -> None:
        before = int(self._slot(blocks, position - 1)) if position else 1
        value = (before * 6364136223846793005 + token_id + 1) & MASK
        if before == MASK or token_id == self.nan_id:
            value = MASK  # poison: all that follows is lost
        self.slots[blocks[position // self.block_size], position % self.block_size] = value

    def _slot(self, blocks: list[int], position: int) -> np.uint64:
        return self.slots[blocks[position // self.block_size], position % self.block_size]

    def _line(self, blocks: list[int], position: int) -> npt.NDArray[np.float32]:
        """Logits that depend on every slot up to `position`."""
        context = self.slots[blocks].reshape(-1)[: position + 1]
        if context[-1] == MASK:
            return np.full(self.vocab_size, np.nan, np.float32)
        odd = np.arange(1, 2 * len(context), 2, dtype=np.uint64)
        digest = (context ^ (context >> np.uint64(29))) * odd
        state = np.bitwise_xor.reduce(digest * np.uint64(0x9E3779B97F4A7C15))
        line = (state + np.arange(self.vocab_size, dtype=np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        line = (line ^ (line >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        return ((line >> np.uint64(40)).astype(np.float32) / np.float32(2**21)) - np.float32(4)


def make_engine(runner: FakeRunner, **settings: object) -> Engine:
    settings = {"max_model_len": min(64, runner.num_blocks * runner.block_size), **settings}
    info = ModelInfo(max_model_len=1 << 20, eos_token_ids=(EOS,), system_fingerprint="fake")
    return Engine(runner, info, EngineConfig(model="fake", **settings))


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
    """What a client sees of one choice: ids, float bits of the log-probabilities, the reason it ended, its error."""
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
    engine = make_engine(FakeRunner(64, 16, **runner_settings))
    engine.submit(Submit("solo", "solo", request.prompt_ids, sampling))
    return answer(collect(run(engine))["solo", 0])
