"""What the next step computes: continuous batching with chunked prefill, and preemption when blocks run out.

Earlier arrivals go first. Which tokens share a step never changes a result, so every choice here is free.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from jinn.engine.cache import BlockCache, BlockTable
from jinn.engine.messages import check_range
from jinn.engine.sequence import Sequence, SequenceStatus

_arrival = attrgetter("arrival")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of a step and of a sequence. Raises ValueError naming the field."""

    max_num_seqs: int  # that run at the same time
    max_num_batched_tokens: (
        int  # of one step; but each sequence that generates gets one, and prompts at least one
    )
    max_model_len: int  # tokens of prompt and output together
    max_step_ms: float  # aimed at by steps that read a prompt while others generate

    def __post_init__(self) -> None:
        check_range("max_num_seqs", self.max_num_seqs, 1, 65536)
        check_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        check_range("max_model_len", self.max_model_len, 2, 2**31 - 1)
        check_range("max_step_ms", self.max_step_ms, 1.0, 1e6)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The tokens of one sequence that a step computes: positions `start` to `stop`."""

    sequence: Sequence
    start: int
    stop: int
    is_last: bool  # nothing known is left to compute: the next token is drawn


class Scheduler:
    """Decides which sequences run, and gives them blocks.

    A sequence runs once its whole prompt has room. Each step computes one token of every sequence that
    generates, then prompts, the earliest first. When a generating sequence finds no block, the latest arrival
    gives its blocks up and waits again, so the earliest always goes on; since `max_model_len` fits the cache,
    every sequence ends.
    """

    def __init__(self, config: SchedulerConfig, cache: BlockCache) -> None:
        if cache.num_blocks_for(config.max_model_len) > cache.num_blocks:
            raise ValueError(
                f"max_model_len of {config.max_model_len} does not fit into {cache.num_blocks} blocks"
            )
        self.config = config
        self.cache = cache
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

    def schedule(self, prefill_speed: float | None) -> list[Chunk]:
        """The next step's chunks, at most one per sequence; empty only when there is no work.

        `prefill_speed` is the measured tokens per ms. It limits prompt tokens so that a step in which others
        generate takes about `max_step_ms`.
        """
        chunks = self._schedule_decodes()
        budget = self.config.max_num_batched_tokens - len(chunks)
        if chunks and prefill_speed is not None:
            budget = min(budget, int(prefill_speed * self.config.max_step_ms))
        budget = max(budget, 1)
        for sequence in self.running:
            if sequence.num_uncomputed_tokens > 1 and budget:
                budget -= self._add_chunk(chunks, sequence, budget)
        while budget and self.waiting and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            if not self._start(sequence):
                break
            budget -= self._add_chunk(chunks, sequence, budget)
        return chunks

    def commit(self, chunk: Chunk) -> None:
        """Record that a chunk is computed."""
        sequence = chunk.sequence
        self.cache.commit(sequence.table, sequence.token_ids(chunk.start, chunk.stop))
        sequence.num_computed_tokens = chunk.stop
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

    def check_integrity(self, other_tables: Iterable[BlockTable] = ()) -> None:
        """Raise IntegrityError unless the cache's books match the sequences that run, and `other_tables`."""
        self.cache.check_integrity([*(sequence.table for sequence in self.running), *other_tables])

    def _schedule_decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        index = 0
        while index < len(self.running):  # preemption shortens the list from its end
            sequence = self.running[index]
            if sequence.num_uncomputed_tokens == 1 and self._make_room(sequence):
                self._add_chunk(chunks, sequence, 1)
            index += 1
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """Get a block for the sequence's next token; False if that took preempting the sequence itself."""
        while not self.cache.allocate(sequence.table, sequence.num_tokens):
            if self.preempt_latest() is sequence:
                return False
        return True

    def _add_chunk(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed_tokens
        num_tokens = min(sequence.num_tokens - start, budget)
        stop = start + num_tokens
        chunks.append(Chunk(sequence, start, stop, stop == sequence.num_tokens))
        return num_tokens

    def _start(self, sequence: Sequence) -> bool:
        """Run the first of `waiting`, if its tokens have room."""
        if self.cache.num_available_blocks <= self._refused_with:
            return False
        table = self.cache.acquire(sequence.tenant, sequence.token_ids(0, sequence.num_tokens - 1))
        # One spare block for each sequence that runs, lest the next few tokens preempt what was just started.
        if not self.cache.allocate(table, sequence.num_tokens, num_spare_blocks=len(self.running)):
            self.cache.release(table)
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
        sequence.block_table = None
        sequence.num_computed_tokens = 0
