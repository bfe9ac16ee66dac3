"""One choice of a request, from its arrival to its last token. Knows neither models nor prefix trees."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from jinn.engine.cache import BlockTable, IntegrityError
from jinn.engine.messages import FinishReason, SamplingParams
from jinn.engine.sampler import SampleRow
from jinn.engine.thinking import Thinking
from jinn.ops.protocol import IntArray

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
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) - self.num_computed_tokens

    def token_ids(self, start: int, stop: int) -> IntArray:
        """Ids of prompt and output from position `start` to `stop`."""
        split = len(self.prompt_ids)
        if stop <= split:
            return self.prompt_ids[start:stop]
        output = np.array(self.output_ids[max(start - split, 0) : stop - split], np.int32)
        return output if start >= split else np.concatenate((self.prompt_ids[start:], output))

    def sample_row(self) -> SampleRow:
        """What drawing the token after the last one depends on."""
        is_early = len(self.output_ids) < self.sampling.min_tokens
        is_early = is_early or (self.sampling.ignore_eos and self.constraint is not None)
        banned = self.ending_ids if is_early else ()
        seen_ids, output_counts = self.counts.arrays() if self.counts else (_NO_IDS, _NO_IDS)
        forced_id = self.thinking.forced_id() if self.thinking else None
        return SampleRow(
            self.sampling,
            self.seed,
            self.num_tokens,
            seen_ids,
            output_counts,
            tuple(sorted(banned)),
            allowed=self.constraint.start_masks()[0] if self.constraint else None,
            target_id=forced_id,
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Take a drawn token; say whether, and why, it is the last."""
        self.output_ids.append(token_id)
        if self.counts:
            self.counts.add(token_id)
        if self.thinking:
            self.thinking.advance(token_id)
        if token_id in self.ending_ids:
            return FinishReason.STOP
        if self.constraint:
            self.constraint.advance(token_id)
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

    def arrays(self) -> tuple[IntArray, IntArray]:
        """(ids, counts), both int32 [number of distinct ids]."""
        size = len(self._slots)
        return self._ids[:size], self._counts[:size]
