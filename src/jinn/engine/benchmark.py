"""Times a runner as llama-bench does, on random tokens and without scheduler or text, and probes the machine.

Unlike llama-bench's, the times contain the draw of each token, which is greedy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import numpy as np

from jinn import _native
from jinn.engine.batch import pack, with_states
from jinn.engine.messages import SamplingParams
from jinn.engine.runner import NativeRunner
from jinn.engine.sampler import SampleRow
from jinn.ops.protocol import Batch, IntArray

_GREEDY = SamplingParams(temperature=0.0)
_NO_IDS = np.empty(0, np.int32)

_PROBED_BYTES = 2**30  # far more than any processor's cache
_PROBE_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do: bytes read per second, and operations per second by arithmetic."""

    read_bandwidth: float
    int8: float
    bf16: float
    f32: float

    def seconds(self, operations: Mapping[str, float]) -> float:
        """The least time that operations take, by arithmetic."""
        return sum(count / float(getattr(self, kind)) for kind, count in operations.items())


def probe(num_threads: int, kernels: _native.Kernels) -> Limits:
    """Measure the limits; takes about two seconds and 1 GiB of memory."""
    pool = _native.ThreadPool(num_threads)
    return Limits(
        _native.read_bandwidth(pool, kernels, _PROBED_BYTES, _PROBE_REPEATS),
        *(_native.peak(pool, kernels, kind, _PROBE_REPEATS) for kind in ("int8", "bf16", "f32")),
    )


class Benchmark:
    """Random prompts for a runner whose cache holds `num_seqs` sequences of `max_len` tokens.

    `chunk_size` is the most tokens of one step.
    """

    def __init__(self, runner: NativeRunner, num_seqs: int, max_len: int, chunk_size: int) -> None:
        blocks_each = num_blocks(1, max_len, runner.block_size)
        tables = np.arange(num_seqs * blocks_each, dtype=np.int32)
        self._runner = runner
        self._block_tables = tables.reshape(num_seqs, blocks_each)
        self._chunk_size = chunk_size
        self._num_read = [0] * num_seqs  # tokens of each sequence that the cache holds

    def prefill_seconds(self, num_tokens: int) -> float:
        """To read a prompt; of its last token the logits are computed, and the next one drawn."""
        started = perf_counter()
        self._read_prompt(0, num_tokens)
        return perf_counter() - started

    def prefill_stage_seconds(self, num_tokens: int) -> list[float]:
        """Of each stage of reading a prompt, without the draw: shorter times than the whole."""
        batches = self._prompt(0, num_tokens)
        return [seconds for batch in batches for _, seconds in self._runner.profile(batch)]

    def decode_seconds(self, num_seqs: int, num_tokens: int, depth: int) -> list[float]:
        """Of each of `num_tokens` steps that draw a token for each of `num_seqs` sequences side by side.

        `depth` tokens are before them: what earlier calls have read, and the rest is read first.
        """
        for sequence in range(num_seqs):
            if self._num_read[sequence] < depth:
                self._read_prompt(sequence, depth)
        token_ids = self._random_ids(num_tokens * num_seqs, depth).reshape(num_tokens, num_seqs)
        times = [perf_counter()]
        for step in range(num_tokens):
            self._decode(token_ids[step], depth + step)
            times.append(perf_counter())
        return [end - start for start, end in pairwise(times)]

    def _read_prompt(self, sequence: int, num_tokens: int) -> None:
        for batch in self._prompt(sequence, num_tokens):
            self._step(batch, num_tokens)
        self._num_read[sequence] = max(self._num_read[sequence], num_tokens)

    def _prompt(self, sequence: int, num_tokens: int) -> Iterator[Batch]:
        token_ids = self._random_ids(num_tokens, sequence)
        for start in range(0, num_tokens, self._chunk_size):
            stop = min(start + self._chunk_size, num_tokens)
            rows = [stop - start - 1] if stop == num_tokens else []
            batch = pack([token_ids[start:stop]], [start], [self._block_tables[sequence]], rows)
            yield self._with_states(batch, [sequence])

    def _decode(self, token_ids: IntArray, position: int) -> None:
        num_seqs = len(token_ids)
        tables = list(self._block_tables[:num_seqs])
        batch = pack(list(token_ids[:, None]), [position] * num_seqs, tables, range(num_seqs))
        self._step(self._with_states(batch, range(num_seqs)), position + 1)

    def _with_states(self, batch: Batch, sequences: Sequence[int]) -> Batch:
        """Sequence s keeps its recurrent states, if the model has any, in slot s."""
        none = [0] * len(sequences)
        return with_states(batch, list(sequences), none, none) if self._runner.num_state_slots else batch

    def _step(self, batch: Batch, num_tokens: int) -> None:
        self._runner.step(batch, [_row(num_tokens)] * len(batch.logit_rows))

    def _random_ids(self, count: int, seed: int) -> IntArray:
        """The same each time, and so the same experts."""
        return np.random.default_rng(seed).integers(0, self._runner.vocab_size, count, np.int32)


def num_blocks(num_seqs: int, max_len: int, block_size: int) -> int:
    """Cache blocks for `num_seqs` sequences of `max_len` tokens."""
    return num_seqs * -(-max_len // block_size)


def _row(position: int) -> SampleRow:
    return SampleRow(_GREEDY, 0, position, _NO_IDS, _NO_IDS)
