"""What the next step computes: continuous batching with chunked prefill, and preemption when blocks run out.

Earlier arrivals go first. Which tokens share a step never changes a result, so every choice here is free.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from jinn.engine.cache import BlockCache, BlockTable, IntegrityError
from jinn.engine.messages import check_range
from jinn.engine.sequence import Sequence, SequenceStatus
from jinn.engine.states import StatePool
from jinn.ops.protocol import IntArray

_arrival = attrgetter("arrival")
_FIRST_TURNS, _LAST_TURNS = 2, 2


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of a sequence. Raises ValueError naming the field."""

    max_num_seqs: int  # that run at the same time
    max_num_batched_tokens: (
        int  # of one step; but each sequence that generates gets one, and prompts at least one
    )
    max_model_len: int  # tokens of prompt and output together

    def __post_init__(self) -> None:
        check_range("max_num_seqs", self.max_num_seqs, 1, 65536)
        check_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        check_range("max_model_len", self.max_model_len, 2, 2**31 - 1)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that a step computes: positions `start` to `stop`, and drafts after them."""

    sequence: Sequence
    start: int
    stop: int
    is_last: bool  # nothing known is left to compute: the next token is drawn
    drafts: tuple[int, ...] = ()  # tokens that may come next; only with `is_last`
    keeps_last_aside: bool = False  # the states take in the last token with the next step only

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start + len(self.drafts)

    @property
    def reads_prompt(self) -> bool:
        """More than the last token, whose successor is drawn."""
        return not self.is_last or self.stop - self.start > 1

    def token_ids(self) -> IntArray:
        """Ids [num_tokens] of all that is computed."""
        known = self.sequence.token_ids(self.start, self.stop)
        return np.concatenate((known, np.array(self.drafts, np.int32))) if self.drafts else known


class Scheduler:
    """Decides which sequences run, and gives them blocks.

    A sequence runs once its whole prompt has room. Each step computes one token of every sequence that
    generates, and its drafts, then prompts, the earliest first. When a generating sequence finds no block,
    the latest arrival gives its blocks up and waits again, so the earliest always goes on; since
    `max_model_len` fits the cache, every sequence ends.

    With `states` a sequence also holds a slot of recurrent states, of which snapshots are taken where others
    may go on from: where turns start, where a prompt leaves what others had computed, and before a prompt's
    last token, since the same prompt needs that one's logits again.
    """

    def __init__(self, config: SchedulerConfig, cache: BlockCache, states: StatePool | None = None) -> None:
        if cache.num_blocks_for(config.max_model_len) > cache.num_blocks:
            raise ValueError(
                f"max_model_len of {config.max_model_len} does not fit into {cache.num_blocks} blocks"
            )
        self.config = config
        self.cache = cache
        self.states = states
        self.running: list[Sequence] = []  # sorted by arrival
        self.waiting: list[Sequence] = []  # sorted by arrival; followers wait with their leader instead
        self.num_followers = 0
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up in the cache, and
        self.num_cached_tokens = 0  # found there
        self._refused_with = -1  # available blocks when the first of `waiting` last found too few

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self.num_followers

    def add(self, sequences: list[Sequence]) -> None:
        """Queue the choices of a request. All but the first wait for its prompt, to find it cached."""
        leader, *followers = sequences
        self._enqueue(leader)
        self._follow(leader, followers)

    def schedule(self, num_tokens_beside_others: int) -> list[Chunk]:
        """The next step's chunks, at most one per sequence, those of one adapter side by side.

        Empty only when there is no work. A step in which others generate reads at most
        `num_tokens_beside_others` prompt tokens, and at least 1.
        """
        chunks = self._schedule_decodes()
        budget = self.config.max_num_batched_tokens - sum(chunk.num_tokens for chunk in chunks)
        if chunks:
            budget = min(budget, num_tokens_beside_others)
        budget = max(budget, 1)
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1 and budget:
                budget -= self._add_chunk(chunks, sequence, budget)
        while budget and self.waiting and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            if not self._start(sequence):
                break
            budget -= self._add_chunk(chunks, sequence, budget)
        chunks.sort(key=lambda chunk: chunk.sequence.adapter)
        return chunks

    def commit(self, chunk: Chunk, num_accepted: int = 0) -> None:
        """Record that a chunk is computed, and how many of its drafts turned out right."""
        sequence = chunk.sequence
        stop = chunk.stop + num_accepted
        self.cache.commit(sequence.table, sequence.token_ids(chunk.start, stop))
        sequence.num_computed_tokens = stop
        if self.states:
            self._commit_states(self.states, chunk, num_accepted)
        if sequence.followers and chunk.stop >= sequence.num_prompt_tokens:
            followers, sequence.followers = sequence.followers, []
            self.num_followers -= len(followers)
            for follower in followers:
                self._stop_following(follower)

    def finish(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a sequence out and free its blocks; with `keep=False` nothing of it stays in the cache."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._release(sequence, keep=keep)
        elif sequence.leader:
            sequence.leader.followers.remove(sequence)
            self.num_followers -= 1
        else:
            self.waiting.remove(sequence)
            self._refused_with = -1
        sequence.status = SequenceStatus.FINISHED
        if sequence.followers:
            self.num_followers -= len(sequence.followers)
            leader, *followers = sequence.followers
            sequence.followers = []
            self._stop_following(leader)
            self._follow(leader, followers)

    def preempt_latest(self) -> Sequence:
        """Send the running sequence that arrived last back to wait. What it computed stays for reuse."""
        sequence = self.running.pop()
        self._release(sequence)
        self._enqueue(sequence)
        self.num_preemptions += 1
        return sequence

    def check_integrity(
        self, other_tables: Iterable[BlockTable] = (), other_slots: Iterable[int] = ()
    ) -> None:
        """Raise IntegrityError unless the books match what running sequences, and others, hold."""
        self.cache.check_integrity([*(sequence.table for sequence in self.running), *other_tables])
        if self.states:
            self.states.check_integrity([*(sequence.slot for sequence in self.running), *other_slots])
            for sequence in self.running:
                if sequence.num_state_tokens + sequence.num_pending_tokens != sequence.num_computed_tokens:
                    raise IntegrityError("a sequence's states and keys are of different tokens")

    def _schedule_decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        index = 0
        while index < len(self.running):  # preemption shortens the list from its end
            sequence = self.running[index]
            if sequence.num_uncomputed_tokens == 1 and self._make_room(sequence):
                drafts = self._drafts(sequence)
                chunks.append(
                    Chunk(sequence, sequence.num_computed_tokens, sequence.num_tokens, True, drafts)
                )
            index += 1
        return chunks

    def _drafts(self, sequence: Sequence) -> tuple[int, ...]:
        """The sequence's drafts, as far as it may go on, if there is room for them without preempting."""
        drafts, sequence.drafts = sequence.drafts, ()
        drafts = drafts[: sequence.max_num_tokens - sequence.num_tokens - 1]
        num_tokens, num_spare = sequence.num_tokens + len(drafts), len(self.running)
        if drafts and self.cache.allocate(sequence.table, num_tokens, num_spare_blocks=num_spare):
            return drafts
        return ()

    def _make_room(self, sequence: Sequence) -> bool:
        """Get a block for the sequence's next token; False if that took preempting the sequence itself."""
        while not self.cache.allocate(sequence.table, sequence.num_tokens):
            if self.preempt_latest() is sequence:
                return False
        return True

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed_tokens
        num_tokens = min(sequence.num_tokens - start, budget)
        num_tokens = min([num_tokens, *(cut - start for cut in sequence.cuts if cut > start)])
        stop = start + num_tokens
        is_prompt_end = stop == sequence.num_prompt_tokens and num_tokens > 1
        chunks.append(
            Chunk(
                sequence,
                start,
                stop,
                is_last=stop == sequence.num_tokens,
                keeps_last_aside=is_prompt_end and self.states is not None,
            )
        )
        return num_tokens

    def _start(self, sequence: Sequence) -> bool:
        """Run the first of `waiting`, if its tokens have room."""
        if self.cache.num_available_blocks <= self._refused_with:
            return False
        if self.states and not self.states.num_available_slots:
            return False
        table = self._acquire(sequence)
        # One spare block for each sequence that runs, lest the next few tokens preempt what was just started.
        if not self.cache.allocate(table, sequence.num_tokens, num_spare_blocks=len(self.running)):
            self.cache.release(table)
            self._release_states(sequence)
            self._refused_with = self.cache.num_available_blocks
            return False
        self._refused_with = -1
        self.waiting.pop(0)
        insort(self.running, sequence, key=_arrival)
        sequence.block_table = table
        sequence.num_computed_tokens = table.num_tokens
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = table.num_tokens
        if not sequence.has_started:
            sequence.has_started = True
            self.num_cached_tokens += table.num_tokens
            self.num_prefix_queries += sequence.num_prompt_tokens
        sequence.status = SequenceStatus.RUNNING
        return True

    def _acquire(self, sequence: Sequence) -> BlockTable:
        """Its blocks of the longest cached prefix and, with `states`, a slot that has taken in the same."""
        known = sequence.token_ids(0, sequence.num_tokens - 1)
        if not self.states:
            return self.cache.acquire(sequence.tenant, known, sequence.adapter)
        while True:
            known = self._start_states(self.states, sequence, known)
            table = self.cache.acquire(sequence.tenant, known, sequence.adapter)
            if table.num_tokens == len(known):
                return table
            # no block was left to copy a partly matching one into: go on from a shorter prefix
            self.cache.release(table)
            self._release_states(sequence)
            known = known[: table.num_tokens]

    def _start_states(self, states: StatePool, sequence: Sequence, known: IntArray) -> IntArray:
        """Give the sequence a slot; returns the tokens that its states have taken in."""
        num_cached = self.cache.match_length(sequence.tenant, known, sequence.adapter)
        slot, num_tokens = states.start(sequence.tenant, known[:num_cached], sequence.adapter)
        sequence.state_slot, sequence.num_state_tokens = slot, num_tokens
        sequence.cuts = _cuts(sequence)
        if num_cached - num_tokens >= self.cache.block_size:
            sequence.cuts = (*sequence.cuts, num_cached)
        return known[:num_tokens]

    def _commit_states(self, states: StatePool, chunk: Chunk, num_accepted: int) -> None:
        """Record what the states have taken in, and take a snapshot where others may go on from."""
        sequence = chunk.sequence
        sequence.num_state_tokens = chunk.stop - chunk.keeps_last_aside
        sequence.num_pending_tokens = num_accepted + chunk.keeps_last_aside
        if sequence.num_state_tokens in (*sequence.cuts, sequence.num_prompt_tokens - 1):
            taken_in = sequence.token_ids(0, sequence.num_state_tokens)
            states.snapshot(sequence.slot, sequence.tenant, taken_in, sequence.adapter)

    def _release_states(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Give up the sequence's slot, which stays as a snapshot unless `keep=False`."""
        if self.states and keep:
            taken_in = sequence.token_ids(0, sequence.num_state_tokens)
            self.states.keep(sequence.slot, sequence.tenant, taken_in, sequence.adapter)
        elif self.states:
            self.states.release(sequence.slot)
        sequence.state_slot = None
        sequence.num_state_tokens = sequence.num_pending_tokens = 0

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence, key=_arrival)
        if self.waiting[0] is sequence:
            self._refused_with = -1

    def _follow(self, leader: Sequence, followers: list[Sequence]) -> None:
        leader.followers = followers
        self.num_followers += len(followers)
        for follower in followers:
            follower.leader = leader

    def _stop_following(self, follower: Sequence) -> None:
        """Queue a choice that waited. What its leader computed does not count as found in the cache."""
        if follower.leader:
            follower.num_cached_tokens = follower.leader.num_cached_tokens
        follower.leader = None
        self._enqueue(follower)

    def _release(self, sequence: Sequence, *, keep: bool = True) -> None:
        self.cache.release(sequence.table, keep=keep)
        self._release_states(sequence, keep=keep)
        sequence.block_table = None
        sequence.num_computed_tokens = 0
        sequence.drafts = ()


def _cuts(sequence: Sequence) -> tuple[int, ...]:
    """Where the prompt is cut for snapshots: at the first turns, which others may share, and the last."""
    starts = [start for start in sequence.turn_starts if start < sequence.num_prompt_tokens]
    return tuple(dict.fromkeys((*starts[:_FIRST_TURNS], *starts[-_LAST_TURNS:])))
