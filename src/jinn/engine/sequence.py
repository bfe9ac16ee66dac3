"""One choice of a request, from its arrival to its last token. Knows neither models nor prefix trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from jinn.engine.cache import BlockTable, IntegrityError
from jinn.engine.messages import FinishReason, SamplingParams
from jinn.engine.sampler import IdBits, SampleRow
from jinn.engine.thinking import Thinking
from jinn.ops.protocol import NO_ADAPTER, IntArray

if TYPE_CHECKING:
    from jinn.engine.constraint import Constraint

_NO_IDS = np.empty(0, np.int32)


class SequenceStatus(StrEnum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """All that the engine knows of one choice. The choices of a request share `prompt_ids`."""

    request_id: str
    index: int
    tenant: str
    prompt_ids: IntArray
    sampling: SamplingParams
    seed: int  # sampling.seed + index
    arrival: int  # earlier arrivals go first
    max_num_tokens: int  # prompt and output together
    ending_ids: frozenset[int]  # end-of-sequence and stop ids
    leader: Sequence | None = None  # the choice whose prompt this one waits for
    followers: list[Sequence] = field(default_factory=list)  # the choices that wait for this one's prompt
    output_ids: list[int] = field(default_factory=list)
    block_table: BlockTable | None = None  # while running
    num_computed_tokens: int = 0  # whose keys and values are stored
    num_cached_tokens: int | None = None  # prompt tokens that the request found in the cache
    has_started: bool = False
    status: SequenceStatus = SequenceStatus.WAITING
    turn_starts: tuple[int, ...] = ()  # prompt positions
    adapter: int = NO_ADAPTER  # its number among those loaded
    drafts: tuple[int, ...] = ()  # guessed tokens that the next step may check
    # Of models with recurrent states, while running:
    state_slot: int | None = None
    num_state_tokens: int = 0  # that the slot has taken in
    num_pending_tokens: int = 0  # computed tokens that it takes in with the next step
    cuts: tuple[int, ...] = ()  # positions at which its prompt is cut for snapshots
    counts: TokenCounts | None = None  # where a penalty is set
    thinking: Thinking | None = None  # where thoughts have a budget
    constraint: Constraint | None = None  # where a grammar is

    def __post_init__(self) -> None:
        s = self.sampling
        if s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0:
            self.counts = TokenCounts(self.prompt_ids)
        if s.thinking_budget is not None:
            self.thinking = Thinking.start(s.thinking_budget)

    @property
    def table(self) -> BlockTable:
        """The block table. Raises IntegrityError unless the sequence runs."""
        if self.block_table is None:
            raise IntegrityError(f"a {self.status} sequence has no blocks")
        return self.block_table

    @property
    def slot(self) -> int:
        """The slot of its recurrent states. Raises IntegrityError unless it has one."""
        if self.state_slot is None:
            raise IntegrityError(f"a {self.status} sequence has no states")
        return self.state_slot

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) - self.num_computed_tokens

    @property
    def last_token_id(self) -> int:
        return self.output_ids[-1] if self.output_ids else int(self.prompt_ids[-1])

    def token_ids(self, start: int, stop: int) -> IntArray:
        """Ids of prompt and output from position `start` to `stop`."""
        split = len(self.prompt_ids)
        if stop <= split:
            return self.prompt_ids[start:stop]
        output = np.array(self.output_ids[max(start - split, 0) : stop - split], np.int32)
        return output if start >= split else np.concatenate((self.prompt_ids[start:], output))

    def sample_row(self, drafts: tuple[int, ...] = ()) -> SampleRow:
        """What drawing the token after the last one, and after drafts that were right, depends on."""
        return self.sample_rows(drafts)[-1]

    def sample_rows(self, drafts: tuple[int, ...] = ()) -> list[SampleRow]:
        """Of the last token and of each draft, what drawing the one after it depends on."""
        if self.constraint is None:
            return [self._sample_row(drafts[:count], None) for count in range(len(drafts) + 1)]
        masks = self.constraint.start_masks(drafts, self._forced(drafts))
        return [self._sample_row(drafts[:count], mask) for count, mask in enumerate(masks)]

    def _forced(self, drafts: tuple[int, ...]) -> set[int]:
        """The indices of drafts that close thoughts whose budget is spent."""
        if self.thinking is None:
            return set()
        return {i for i, draft in enumerate(drafts) if self.thinking.forced_id(drafts[:i]) == draft}

    def _sample_row(self, drafts: tuple[int, ...], allowed: Callable[[], IdBits] | None) -> SampleRow:
        is_early = len(self.output_ids) + len(drafts) < self.sampling.min_tokens
        is_early = is_early or (self.sampling.ignore_eos and self.constraint is not None)
        banned = self.ending_ids if is_early else ()
        seen_ids, output_counts = self.counts.arrays(drafts) if self.counts else (_NO_IDS, _NO_IDS)
        return SampleRow(
            self.sampling,
            self.seed,
            self.num_tokens + len(drafts),
            seen_ids,
            output_counts,
            tuple(sorted(banned)),
            allowed=allowed,
            target_id=self.thinking.forced_id(drafts) if self.thinking else None,
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Take a drawn token; say whether, and why, it is the last."""
        self.output_ids.append(token_id)
        if self.counts:
            self.counts.add(token_id)
        is_forced = self.thinking is not None and self.thinking.forced_id() == token_id
        if self.thinking:
            self.thinking.advance(token_id)
        if token_id in self.ending_ids:
            return FinishReason.STOP
        if self.constraint:
            self.constraint.advance(token_id, is_forced=is_forced)
        return FinishReason.LENGTH if self.num_tokens >= self.max_num_tokens else None


class TokenCounts:
    """The distinct ids of a sequence, and how often each was generated."""

    def __init__(self, prompt_ids: IntArray) -> None:
        self._ids = np.unique(prompt_ids)
        self._counts = np.zeros(len(self._ids), np.int32)
        self._slots = {int(token_id): slot for slot, token_id in enumerate(self._ids)}

    def add(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros(slot + 16, np.int32)))
            self._counts = np.concatenate((self._counts, np.zeros(slot + 16, np.int32)))
        self._ids[slot] = token_id
        self._counts[slot] += 1

    def arrays(self, drafts: tuple[int, ...] = ()) -> tuple[IntArray, IntArray]:
        """(ids, counts), both int32 [number of distinct ids], as if the drafts had been generated too."""
        if drafts:
            return self._copy_with(drafts).arrays()
        size = len(self._slots)
        return self._ids[:size], self._counts[:size]

    def _copy_with(self, token_ids: tuple[int, ...]) -> TokenCounts:
        copy = TokenCounts(_NO_IDS)
        copy._ids, copy._counts, copy._slots = self._ids.copy(), self._counts.copy(), self._slots.copy()
        for token_id in token_ids:
            copy.add(token_id)
        return copy
