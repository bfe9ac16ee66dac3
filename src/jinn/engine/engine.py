"""The engine's step: schedule, compute, draw, report. One request's failure ends that request only."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from jinn.engine.batch import batch_of, pack, with_states
from jinn.engine.cache import BlockCache, IntegrityError
from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.messages import (
    Abort,
    EngineStats,
    FinishReason,
    Prefilling,
    Ready,
    Score,
    ScoreOutput,
    StepOutput,
    Submit,
    TokenOutput,
)
from jinn.engine.sampler import SampledToken
from jinn.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from jinn.engine.scoring import SCRATCH_TENANT, Scorer
from jinn.engine.sequence import Sequence
from jinn.engine.states import StatePool
from jinn.engine.step_size import StepSize
from jinn.ops.protocol import NO_ADAPTER, IntArray

if TYPE_CHECKING:
    from jinn.engine.constraint import Constraint
    from jinn.engine.drafting import Drafter
    from jinn.engine.grammars import GrammarQueue
    from jinn.engine.runner import Runner

logger = logging.getLogger(__name__)

_COMPILE_WAIT_SECONDS = 0.01  # of a step that has nothing else to do


class Engine:
    """Serves requests on one model. Not thread-safe.

    `ready` tells what was settled on: limits, cache and notes. Raises ValueError if the cache is too small.
    """

    def __init__(
        self, runner: Runner, info: ModelInfo, config: EngineConfig, drafter: Drafter | None = None
    ) -> None:
        limits, notes = _fit(runner, info, config)
        quota = config.tenant_cache_memory
        self._runner = runner
        self._cache = BlockCache(
            runner.num_blocks,
            runner.block_size,
            runner.copy_block,
            None if quota is None else runner.num_blocks * quota // config.cache_memory,
        )
        self._states = _state_pool(runner, config)
        self._scheduler = Scheduler(limits, self._cache, self._states)
        self._drafter = drafter
        self._adapters = {name: number for number, (name, _) in enumerate(info.adapters)}
        self._scorer = Scorer(runner, self._cache, self._states, self._adapters)
        self._eos_token_ids = frozenset(info.eos_token_ids)
        self._load_tokenizer = info.load_tokenizer
        self._grammars: GrammarQueue | None = None  # from the first request that has one
        self._requests: dict[str, list[Sequence]] = {}  # the choices that have not ended
        self._arrivals = 0
        self._ended: list[TokenOutput] = []  # outside of a step, to be told by the next
        self._step_size = StepSize(config.max_step_ms, limits.max_num_batched_tokens)
        self._num_prompt_tokens = self._num_generation_tokens = self._num_steps = 0
        self._num_drafts = self._num_draft_tokens = self._num_accepted_tokens = 0
        self._step_seconds = 0.0
        self.ready = Ready(
            limits.max_model_len,
            limits.max_num_seqs,
            runner.vocab_size,
            runner.num_blocks,
            runner.block_size,
            info.eos_token_ids,
            info.system_fingerprint,
            (*info.notes, *notes),
            info.adapters,
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would do or tell anything."""
        is_compiling = self._grammars is not None and self._grammars.has_work
        return is_compiling or self._has_other_work

    @property
    def _has_other_work(self) -> bool:
        return self._scheduler.has_work or self._scorer.has_work or bool(self._ended)

    @property
    def stats(self) -> EngineStats:
        scheduler, cache = self._scheduler, self._cache
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_blocks=cache.num_blocks,
            num_used_blocks=cache.num_blocks - cache.num_available_blocks,
            num_cached_blocks=cache.num_cached_blocks,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_generation_tokens=self._num_generation_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_states=self._states.num_slots if self._states else 0,
            num_snapshots=self._states.num_snapshots if self._states else 0,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_steps=self._num_steps,
            step_seconds=self._step_seconds,
        )

    def submit(self, request: Submit) -> None:
        """Queue a request. One that cannot be served ends with an error in the next step's output.

        Raises ValueError if a request with this id has not ended.
        """
        is_compiling = self._grammars is not None and request.request_id in self._grammars
        if is_compiling or request.request_id in self._requests:
            raise ValueError(f"request {request.request_id} is already being served")
        if refusal := self._refusal(request):
            self._end_early(request, FinishReason.ERROR, refusal)
        elif request.grammar is not None and self._load_tokenizer is not None:
            if self._grammars is None:
                from jinn.engine.grammars import GrammarQueue

                self._grammars = GrammarQueue(
                    self._load_tokenizer, self._runner.vocab_size, self._eos_token_ids
                )
            self._grammars.add(request, request.grammar)
        else:
            self._admit(request, [None] * request.sampling.n)

    def score(self, request: Score) -> None:
        """Queue a text to be read; see `Score`. One that cannot be ends with an error in a step's output."""
        self._scorer.add(request)

    def abort(self, request: Abort) -> None:
        """Stop a request, or one choice of it, and free what it holds. Unknown ids are ignored."""
        self._scorer.abort(request.request_id)
        if self._grammars is not None and (compiling := self._grammars.abort(request)):
            self._end_early(compiling, FinishReason.ABORT)
        for sequence in list(self._requests.get(request.request_id, ())):
            if request.index is None or request.index == sequence.index:
                self._ended.append(self._end(sequence, FinishReason.ABORT))

    def step(self) -> StepOutput:
        """Compute one batch, draw a token for each sequence whose turn it is, and tell what came of it."""
        started = perf_counter()
        if self._grammars is not None and self._grammars.has_work:
            self._admit_compiled(self._grammars)
        chunks = self._scheduler.schedule(self._step_size.tokens)
        outputs, self._ended = self._ended, []
        prefilling = []
        for chunk, tokens in zip(chunks, self._compute(chunks), strict=True):
            if tokens:
                outputs.append(self._take(chunk, tokens))
            else:
                self._commit(chunk)
                prefilling.append(_progress(chunk))
        if self._drafter:
            self._drafter.draft(chunks)
        scores = self._score(is_alone=not chunks)
        self._num_steps += bool(chunks)
        self._step_seconds = perf_counter() - started
        return StepOutput(tuple(outputs), tuple(prefilling), self.stats, scores)

    def _admit_compiled(self, grammars: GrammarQueue) -> None:
        """Queue the requests whose grammars are ready."""
        for compilation in grammars.take(0.0 if self._has_other_work else _COMPILE_WAIT_SECONDS):
            request = compilation.request
            if compilation.error is not None:
                self._end_early(request, FinishReason.ERROR, compilation.error)
                continue
            self._admit(request, [grammars.constraint(compilation) for _ in range(request.sampling.n)])
            for abort in compilation.aborts:
                self.abort(abort)

    def _admit(self, request: Submit, constraints: list[Constraint] | list[None]) -> None:
        sequences = self._sequences(request)
        for sequence, constraint in zip(sequences, constraints, strict=True):
            sequence.constraint = constraint
        self._requests[request.request_id] = sequences
        self._scheduler.add(list(sequences))

    def _end_early(self, request: Submit, reason: FinishReason, error: str | None = None) -> None:
        """End a request before it has become sequences."""
        self._ended += [
            TokenOutput(request.request_id, i, (), finish_reason=reason, error=error)
            for i in range(request.sampling.n)
        ]

    def _score(self, *, is_alone: bool) -> tuple[ScoreOutput, ...]:
        """Read on in the texts that wait, for as long as a step beside generating sequences may take."""
        if not self._scorer.has_work:
            return ()
        num_tokens = self._scheduler.config.max_num_batched_tokens
        if not is_alone:
            num_tokens = min(num_tokens, self._step_size.tokens)
        output = self._scorer.step(num_tokens, is_alone=is_alone)
        return () if output is None else (output,)

    def logits(self, token_ids: IntArray) -> npt.NDArray[np.float32]:
        """The raw logits after each token, float32 [len(token_ids), vocab_size], on blocks of its own.

        Cached prefixes are neither read nor added to. Raises ValueError where too few blocks are free.
        """
        slot = self._states.start(SCRATCH_TENANT, token_ids[:0])[0] if self._states else None
        table = self._cache.acquire(SCRATCH_TENANT, token_ids[:0])
        try:
            if not self._cache.allocate(table, len(token_ids)):
                raise ValueError(f"{len(token_ids)} tokens need more cache blocks than are free")
            return self._compute_logits(token_ids, table.blocks, slot)
        finally:
            self._cache.release(table, keep=False)
            if self._states and slot is not None:
                self._states.release(slot)

    def _compute_logits(
        self, token_ids: IntArray, blocks: IntArray, slot: int | None
    ) -> npt.NDArray[np.float32]:
        num_tokens, max_num_tokens = len(token_ids), self._scheduler.config.max_num_batched_tokens
        logits = np.empty((num_tokens, self._runner.vocab_size), np.float32)
        for start in range(0, num_tokens, max_num_tokens):
            stop = min(start + max_num_tokens, num_tokens)
            batch = pack([token_ids[start:stop]], [start], [blocks], range(stop - start))
            if slot is not None:
                batch = with_states(batch, [slot], [0], [0])
            logits[start:stop] = self._runner.logits(batch)
        return logits

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every block is accounted for."""
        self._scheduler.check_integrity(self._scorer.tables, self._scorer.slots)

    def _compute(self, chunks: list[Chunk]) -> list[list[SampledToken]]:
        """For each chunk what was drawn after its last token and after each draft, or an error.

        Nothing where its sequence has more to compute first.
        """
        if not chunks:
            return []
        started = perf_counter()
        try:
            rows = [row for c in chunks if c.is_last for row in c.sequence.sample_rows(c.drafts)]
            drawn = list(self._runner.step(batch_of(chunks), rows))
        except Exception:
            if len(chunks) == 1:
                logger.exception("request %s failed", chunks[0].sequence.request_id)
                return [[SampledToken(-1, error="the model failed on this request")]]
            return [tokens for chunk in chunks for tokens in self._compute([chunk])]
        if len(drawn) != len(rows):
            raise IntegrityError(f"the runner drew {len(drawn)} tokens for {len(rows)} rows")
        if num_prompt_tokens := sum(chunk.num_tokens for chunk in chunks if chunk.reads_prompt):
            self._step_size.note(num_prompt_tokens, (perf_counter() - started) * 1e3)
        tokens = iter(drawn)
        return [list(islice(tokens, chunk.is_last + len(chunk.drafts))) for chunk in chunks]

    def _take(self, chunk: Chunk, tokens: list[SampledToken]) -> TokenOutput:
        """Give a sequence the tokens drawn while its drafts were right, or end it for what went wrong."""
        sequence = chunk.sequence
        if tokens[0].error is not None:
            error = (sequence.constraint and sequence.constraint.error) or tokens[0].error
            return self._end(sequence, FinishReason.ERROR, error=error)
        taken, reason = _append(sequence, tokens, chunk.drafts)
        num_accepted = len(taken) - 1
        self._commit(chunk, num_accepted)
        self._num_generation_tokens += len(taken)
        self._num_drafts += bool(chunk.drafts)
        self._num_draft_tokens += len(chunk.drafts)
        self._num_accepted_tokens += num_accepted
        output = TokenOutput(
            sequence.request_id,
            sequence.index,
            tuple(token.token_id for token in taken),
            tuple(token.logprobs for token in taken if token.logprobs is not None),
            sequence.num_cached_tokens or 0,
            len(chunk.drafts),
            num_accepted,
        )
        return self._end(sequence, reason, output) if reason else output

    def _commit(self, chunk: Chunk, num_accepted: int = 0) -> None:
        num_prompt_tokens = min(chunk.stop, chunk.sequence.num_prompt_tokens) - chunk.start
        self._num_prompt_tokens += max(num_prompt_tokens, 0)
        self._scheduler.commit(chunk, num_accepted)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        output: TokenOutput | None = None,
        error: str | None = None,
    ) -> TokenOutput:
        """Take a sequence out of the engine; `output` is its last. What a failed one computed is not kept."""
        self._scheduler.finish(sequence, keep=reason is not FinishReason.ERROR)
        if self._drafter:
            self._drafter.forget(sequence)
        choices = self._requests[sequence.request_id]
        choices.remove(sequence)
        if not choices:
            del self._requests[sequence.request_id]
        if output is None:
            num_cached_tokens = sequence.num_cached_tokens or 0
            output = TokenOutput(sequence.request_id, sequence.index, (), (), num_cached_tokens)
        return replace(output, finish_reason=reason, error=error)

    def _sequences(self, request: Submit) -> list[Sequence]:
        sampling = request.sampling
        prompt_ids = np.array(request.prompt_ids, np.int32)
        max_num_tokens = self.ready.max_model_len
        if sampling.max_tokens is not None:
            max_num_tokens = min(max_num_tokens, len(prompt_ids) + sampling.max_tokens)
        can_ignore_eos = sampling.ignore_eos and request.grammar is None
        eos_token_ids = frozenset() if can_ignore_eos else self._eos_token_ids
        self._arrivals += sampling.n
        return [
            Sequence(
                request_id=request.request_id,
                index=index,
                tenant=request.tenant,
                prompt_ids=prompt_ids,
                sampling=sampling,
                seed=(sampling.seed or 0) + index,
                arrival=self._arrivals - sampling.n + index,
                max_num_tokens=max_num_tokens,
                ending_ids=eos_token_ids.union(sampling.stop_token_ids),
                turn_starts=request.turn_starts,
                adapter=NO_ADAPTER if request.adapter is None else self._adapters[request.adapter],
            )
            for index in range(sampling.n)
        ]

    def _refusal(self, request: Submit) -> str | None:
        """Why a request cannot be served, if so."""
        prompt_ids, sampling = request.prompt_ids, request.sampling
        vocab_size, max_model_len = self.ready.vocab_size, self.ready.max_model_len
        if not prompt_ids:
            return "the prompt has no tokens"
        if len(prompt_ids) >= max_model_len:
            return f"a prompt of {len(prompt_ids)} tokens does not fit max_model_len of {max_model_len}"
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            return f"the prompt has a token id outside the vocabulary of {vocab_size}"
        if any(token_id >= vocab_size for token_id in sampling.logit_bias):
            return f"logit_bias has a token id outside the vocabulary of {vocab_size}"
        if any(token_id >= vocab_size for token_id in sampling.stop_token_ids):
            return f"stop_token_ids has a token id outside the vocabulary of {vocab_size}"
        if sampling.thinking_budget and max(sampling.thinking_budget.token_ids) >= vocab_size:
            return f"thinking_budget has a token id outside the vocabulary of {vocab_size}"
        if request.adapter is not None and request.adapter not in self._adapters:
            return f"there is no adapter {request.adapter!r}"
        if sampling.seed is None:
            return "seed must be set"
        if sampling.stop:
            return "stop strings are matched by the caller"
        if request.grammar is not None and (self._load_tokenizer is None or not self._eos_token_ids):
            return "the model has no tokenizer, or no token that ends an answer, as a grammar needs"
        return None


def _state_pool(runner: Runner, config: EngineConfig) -> StatePool | None:
    """Of a model with recurrent states."""
    if not runner.num_state_slots:
        return None
    quota = config.tenant_cache_memory
    quota_slots = None if quota is None else runner.num_state_slots * quota // config.cache_memory
    return StatePool(runner.num_state_slots, runner.copy_state, quota_slots)


def _progress(chunk: Chunk) -> Prefilling:
    sequence = chunk.sequence
    num_cached_tokens = sequence.num_cached_tokens or 0
    return Prefilling(sequence.request_id, chunk.stop, sequence.num_prompt_tokens, num_cached_tokens)


def _append(
    sequence: Sequence, tokens: list[SampledToken], drafts: tuple[int, ...]
) -> tuple[list[SampledToken], FinishReason | None]:
    """Append what was drawn up to the first token that its draft is not; also why the sequence ends, if so.

    A later row's error is left to come up again when it is the first.
    """
    taken: list[SampledToken] = []
    for token, draft in zip(tokens, (*drafts, None), strict=True):
        if token.error is not None:
            break
        taken.append(token)
        reason = sequence.append(token.token_id)
        if reason or token.token_id != draft:
            return taken, reason
    return taken, None


def _fit(runner: Runner, info: ModelInfo, config: EngineConfig) -> tuple[SchedulerConfig, tuple[str, ...]]:
    """The limits that the model and the cache allow, and a note for each that is not what was asked for."""
    notes = []
    max_model_len = config.max_model_len or info.max_model_len
    if max_model_len > info.max_model_len:
        max_model_len = info.max_model_len
        notes.append(f"max_model_len is {max_model_len}, the most the model was made for")
    capacity = runner.num_blocks * runner.block_size
    if capacity < 2:
        raise ValueError("cache_memory is too small for one block")
    if max_model_len > capacity:
        max_model_len = capacity
        notes.append(f"max_model_len is {max_model_len}, the tokens that fit into cache_memory")
    max_num_seqs = config.max_num_seqs
    if runner.num_state_slots and max_num_seqs > runner.num_state_slots:
        max_num_seqs = runner.num_state_slots
        notes.append(f"max_num_seqs is {max_num_seqs}, the recurrent states that fit into cache_memory")
    if max_num_seqs > runner.num_blocks:
        max_num_seqs = runner.num_blocks
        notes.append(f"max_num_seqs is {max_num_seqs}, the blocks that fit into cache_memory")
    limits = SchedulerConfig(max_num_seqs, config.max_num_batched_tokens, max_model_len)
    return limits, tuple(notes)
