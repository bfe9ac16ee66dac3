"""Runs a model on a batch and draws the next tokens. The engine knows a model only through `Runner`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jinn import _native
from jinn.engine.messages import TokenLogprobs
from jinn.engine.sampler import NOT_FINITE, NOTHING_LEFT, SampledToken, SampleRow
from jinn.ops.native import batch_arrays
from jinn.ops.protocol import Batch

_OUTWEIGHS = 1e30  # added to a logit, it makes the id the likeliest


class Runner(Protocol):
    """A model with its weights and its cache blocks."""

    vocab_size: int
    num_blocks: int
    block_size: int  # tokens per block
    num_state_slots: int  # 0 for models without recurrent states

    def step(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
        """Compute the batch, store its keys and values, and draw one token for each of `batch.logit_rows`.

        An exception leaves recurrent states as they were.
        """
        ...

    def logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Compute the batch and return the raw logits [len(batch.logit_rows), vocab_size]."""
        ...

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Compute the batch and return what the head would read, [len(batch.logit_rows), hidden_size]."""
        ...

    def predict(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
        """Compute the batch with the multi-token prediction module, which reads `batch.hidden`, and draw."""
        ...

    def last_hidden(self) -> npt.NDArray[np.float32]:
        """Hidden states [num_tokens, hidden_size] of the last `step` or `predict`, until the next.

        Only of a runner that was loaded for multi-token prediction.
        """
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy every layer's keys and values of one block to another."""
        ...

    def copy_state(self, source: int, target: int) -> None:
        """Copy every layer's recurrent state of one slot to another."""
        ...


@dataclass(frozen=True, slots=True)
class Programs:
    """What a model has recorded. `hidden_states` makes its program when it is first asked for."""

    model: _native.Program
    hidden_states: Callable[[], _native.Program]
    prediction: _native.Program | None = None  # of the multi-token prediction module


class NativeRunner:
    """The C++ kernels: recorded programs over packed weights, and their cache."""

    def __init__(
        self, programs: Programs, cache: _native.KVCache, states: _native.StateCache | None, vocab_size: int
    ) -> None:
        self._programs, self._cache, self._states = programs, cache, states
        self._last_run: _native.Logits | None = None
        self.vocab_size = vocab_size
        self.num_blocks: int = cache.num_blocks
        self.block_size: int = cache.block_size
        self.num_state_slots: int = states.num_slots if states else 0

    @property
    def num_barriers(self) -> int:
        """At which the threads have met so far."""
        return self._programs.model.num_barriers

    def step(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
        """See `Runner`; the program and the draws each use all threads."""
        return self._draw(self._programs.model, batch, rows)

    def logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        values: npt.NDArray[np.float32] = self._run(self._programs.model, batch).copy()
        return values

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        values: npt.NDArray[np.float32] = self._run(self._programs.hidden_states(), batch).copy()
        return values

    def predict(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
        """See `Runner`. Raises ValueError where the module was not loaded."""
        if self._programs.prediction is None:
            raise ValueError("the model's multi-token prediction module was not loaded")
        return self._draw(self._programs.prediction, batch, rows)

    def last_hidden(self) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        if self._last_run is None:
            raise ValueError("nothing has been computed yet")
        values: npt.NDArray[np.float32] = self._last_run.copy_hidden()
        return values

    def copy_block(self, source: int, target: int) -> None:
        """See `Runner`."""
        self._cache.copy_block(source, target)

    def copy_state(self, source: int, target: int) -> None:
        """See `Runner`. Raises ValueError for a model without recurrent states."""
        if self._states is None:
            raise ValueError("the model has no recurrent states")
        self._states.copy_slot(source, target)

    def profile(self, batch: Batch) -> list[tuple[str, float]]:
        """Compute the batch and return each instruction's name and seconds."""
        return _native.profile(
            self._programs.model, self._cache, self._states, self.vocab_size, batch_arrays(batch)
        )

    def _draw(
        self, program: _native.Program, batch: Batch, rows: Sequence[SampleRow]
    ) -> Sequence[SampledToken]:
        self._last_run = self._run(program, batch)
        sampled = self._last_run.sample([sample_request(row) for row in rows])
        return [_sampled_token(token, row) for token, row in zip(sampled, rows, strict=True)]

    def _run(self, program: _native.Program, batch: Batch) -> _native.Logits:
        return _native.run(program, self._cache, self._states, self.vocab_size, batch_arrays(batch))


def sample_request(row: SampleRow) -> _native.SampleRequest:
    """The row as native/sample.cpp takes it."""
    sampling, request = row.sampling, _native.SampleRequest()
    request.temperature, request.top_k = sampling.temperature, sampling.top_k
    request.top_p, request.min_p = sampling.top_p, sampling.min_p
    request.seed, request.position = row.seed, row.position
    if sampling.logprobs is not None:
        request.num_logprobs = sampling.logprobs
    if row.banned_ids:
        request.banned_ids = list(row.banned_ids)
    if sampling.logit_bias:
        request.bias_ids, request.bias = list(sampling.logit_bias), list(sampling.logit_bias.values())
    if row.target_id is not None:
        request.bias_ids, request.bias = [row.target_id], [_OUTWEIGHS]
    if len(row.seen_ids):
        request.repetition_penalty = sampling.repetition_penalty
        request.presence_penalty = sampling.presence_penalty
        request.frequency_penalty = sampling.frequency_penalty
        request.set_seen(row.seen_ids, row.output_counts)
    if row.allowed is not None:
        request.set_allowed(row.allowed())
    return request


def _sampled_token(sampled: _native.Sampled, row: SampleRow) -> SampledToken:
    if row.target_id is not None and 0 <= sampled.token_id != row.target_id:  # its logit is -inf
        top = tuple(zip(sampled.top_ids, sampled.top_logprobs, strict=True))
        return SampledToken(row.target_id, TokenLogprobs(-math.inf, top))
    if sampled.token_id < 0:
        return SampledToken(-1, error=f"{NOT_FINITE}, or {NOTHING_LEFT}")
    if row.sampling.logprobs is None:
        return SampledToken(sampled.token_id)
    top = tuple(zip(sampled.top_ids, sampled.top_logprobs, strict=True))
    return SampledToken(sampled.token_id, TokenLogprobs(sampled.logprob, top))
