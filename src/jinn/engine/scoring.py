"""Texts that are read and not continued: the log-probabilities of their tokens, or their hidden states.

One is read at a time, a chunk per step, on blocks of its own: cached prefixes are neither read nor added to.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from jinn.engine.batch import pack, with_adapters, with_states
from jinn.engine.cache import BlockCache, BlockTable
from jinn.engine.messages import Pooling, SamplingParams, Score, ScoreOutput, TokenLogprobs
from jinn.engine.runner import Runner
from jinn.engine.sampler import SampleRow
from jinn.engine.states import StatePool
from jinn.ops.protocol import Batch, IntArray

logger = logging.getLogger(__name__)

SCRATCH_TENANT = ""  # of tables that are never committed
MAX_LOGIT_ROWS = 64  # of one step: each row of a large vocabulary takes half a megabyte

_NO_IDS = np.empty(0, np.int32)


@dataclass(slots=True)
class _Job:
    """A text that is being read."""

    request: Score
    token_ids: IntArray
    table: BlockTable | None = None
    slot: int | None = None  # of a model with recurrent states
    num_computed_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    hidden_sum: npt.NDArray[np.float64] | None = None  # [hidden_size]


class Scorer:
    """Queues texts and reads them in order of arrival. Not thread-safe. `adapters` are numbers by name."""

    def __init__(
        self,
        runner: Runner,
        cache: BlockCache,
        states: StatePool | None = None,
        adapters: Mapping[str, int] | None = None,
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._states = states
        self._adapters = adapters or {}
        self._jobs: deque[_Job] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    @property
    def tables(self) -> list[BlockTable]:
        """Those in use."""
        return [job.table for job in self._jobs if job.table is not None]

    @property
    def slots(self) -> list[int]:
        """Those in use."""
        return [job.slot for job in self._jobs if job.slot is not None]

    def add(self, request: Score) -> None:
        self._jobs.append(_Job(request, np.array(request.token_ids, np.int32)))

    def abort(self, request_id: str) -> None:
        """Drop a text. Unknown ids are ignored."""
        for job in [job for job in self._jobs if job.request.request_id == request_id]:
            self._remove(job)

    def step(self, max_tokens: int, *, is_alone: bool) -> ScoreOutput | None:
        """Read up to `max_tokens` of the first text; its answer if that was the last of it.

        Where blocks are short it waits, unless `is_alone`: then no other will ever give any back.
        """
        job = self._jobs[0]
        if job.request.adapter is not None and job.request.adapter not in self._adapters:
            return self._fail(job, f"there is no adapter {job.request.adapter!r}")
        if job.table is None and not self._allocate(job):
            return self._fail(job, "the text does not fit into the cache") if is_alone else None
        try:
            self._read(job, max_tokens)
        except Exception:
            logger.exception("text %s failed", job.request.request_id)
            return self._fail(job, "the model failed on this text")
        if job.num_computed_tokens < len(job.token_ids):
            return None
        self._remove(job)
        return self._answer(job)

    def _allocate(self, job: _Job) -> bool:
        if self._states and not self._states.num_available_slots:
            return False
        table = self._cache.acquire(SCRATCH_TENANT, _NO_IDS)
        if not self._cache.allocate(table, len(job.token_ids)):
            self._cache.release(table, keep=False)
            return False
        job.table = table
        if self._states:
            job.slot, _ = self._states.start(SCRATCH_TENANT, _NO_IDS)
        return True

    def _read(self, job: _Job, max_tokens: int) -> None:
        """Compute the job's next chunk and take from it what was asked for."""
        if job.request.pooling is None:
            stop = min(job.num_computed_tokens + min(max_tokens, MAX_LOGIT_ROWS), len(job.token_ids))
            self._take_logprobs(job, stop)
        else:
            stop = min(job.num_computed_tokens + max_tokens, len(job.token_ids))
            self._take_hidden_states(job, stop)
        job.num_computed_tokens = stop

    def _take_logprobs(self, job: _Job, stop: int) -> None:
        """Each row's target is the token after it; the last token has none."""
        start = job.num_computed_tokens
        sampling = SamplingParams(temperature=0.0, logprobs=job.request.num_logprobs)
        rows = [
            SampleRow(sampling, 0, start + 1 + index, _NO_IDS, _NO_IDS, target_id=int(target))
            for index, target in enumerate(job.token_ids[start + 1 : stop + 1])
        ]
        for token in self._runner.step(self._batch(job, stop, np.arange(len(rows), dtype=np.int32)), rows):
            if token.logprobs is None:
                raise ValueError(token.error or "the runner gave no log-probability")
            job.logprobs.append(token.logprobs)

    def _take_hidden_states(self, job: _Job, stop: int) -> None:
        """Rows are added in order and in float64, so that where chunks end changes nothing."""
        rows = np.arange(stop - job.num_computed_tokens, dtype=np.int32)
        if job.request.pooling is Pooling.LAST:
            rows = rows[-1:] if stop == len(job.token_ids) else rows[:0]
        for state in self._runner.hidden_states(self._batch(job, stop, rows)).astype(np.float64):
            job.hidden_sum = state if job.hidden_sum is None else job.hidden_sum + state

    def _batch(self, job: _Job, stop: int, logit_rows: IntArray) -> Batch:
        """The job's next tokens, up to `stop`."""
        if job.table is None:
            raise ValueError("a text is read before it has blocks")
        start = job.num_computed_tokens
        batch = pack([job.token_ids[start:stop]], [start], [job.table.blocks], logit_rows.tolist())
        if job.request.adapter is not None:
            batch = with_adapters(batch, [self._adapters[job.request.adapter]])
        return batch if job.slot is None else with_states(batch, [job.slot], [0], [0])

    def _answer(self, job: _Job) -> ScoreOutput:
        request_id = job.request.request_id
        if job.request.pooling is None:
            return ScoreOutput(request_id, tuple(job.logprobs))
        if job.hidden_sum is None or not np.isfinite(job.hidden_sum).all():
            return ScoreOutput(request_id, error="the model's hidden states are not finite")
        num_rows = len(job.token_ids) if job.request.pooling is Pooling.MEAN else 1
        return ScoreOutput(request_id, embedding=tuple((job.hidden_sum / num_rows).tolist()))

    def _fail(self, job: _Job, error: str) -> ScoreOutput:
        self._remove(job)
        return ScoreOutput(job.request.request_id, error=error)

    def _remove(self, job: _Job) -> None:
        self._jobs.remove(job)
        if job.table is not None:
            self._cache.release(job.table, keep=False)
            job.table = None
        if self._states and job.slot is not None:
            self._states.release(job.slot)
            job.slot = None
