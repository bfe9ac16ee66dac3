"""Runs a model on a batch and draws the next tokens. The engine knows a model only through `Runner`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
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

    def step(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
        """Compute the batch, store its keys and values, and draw one token for each of `batch.logit_rows`."""
        ...

    def logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Compute the batch and return the raw logits [len(batch.logit_rows), vocab_size]."""
        ...

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Compute the batch and return what the head would read, [len(batch.logit_rows), hidden_size]."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """Copy every layer's keys and values of one block to another."""
        ...


class NativeRunner:
    """The C++ kernels: a recorded program over packed weights, and its cache."""

    def __init__(
        self,
        program: _native.Program,
        cache: _native.KVCache,
        vocab_size: int,
        record_hidden_states: Callable[[], _native.Program],
    ) -> None:
        self._program, self._cache = program, cache
        self._record_hidden_states = functools.cache(record_hidden_states)  # few servers are ever asked
        self.vocab_size = vocab_size
        self.num_blocks: int = cache.num_blocks
        self.block_size: int = cache.block_size

    def step(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
        """See `Runner`; the program and the draws each use all threads."""
        sampled = self._run(batch).sample([sample_request(row) for row in rows])
        return [_sampled_token(token, row) for token, row in zip(sampled, rows, strict=True)]

    def logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        values: npt.NDArray[np.float32] = self._run(batch).copy()
        return values

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        program = self._record_hidden_states()
        rows = _native.run(program, self._cache, None, self.vocab_size, batch_arrays(batch))
        values: npt.NDArray[np.float32] = rows.copy()
        return values

    def copy_block(self, source: int, target: int) -> None:
        """See `Runner`."""
        self._cache.copy_block(source, target)

    def profile(self, batch: Batch) -> list[tuple[str, float]]:
        """Compute the batch and return each instruction's name and seconds."""
        return _native.profile(self._program, self._cache, None, self.vocab_size, batch_arrays(batch))

    def _run(self, batch: Batch) -> _native.Logits:
        return _native.run(self._program, self._cache, None, self.vocab_size, batch_arrays(batch))


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
