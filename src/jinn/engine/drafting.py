"""Guesses at the next tokens, which the model then checks many at a time (speculative decoding).

A draft never changes an answer: at each position the model's own token is drawn, with its own key, and the
drafts count as far as they are that token. So all that a guess can be is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from jinn.engine.batch import pack
from jinn.engine.cache import BlockCache, BlockTable
from jinn.engine.runner import Runner
from jinn.engine.sampler import SampledToken
from jinn.engine.scheduler import Chunk
from jinn.engine.sequence import Sequence, SequenceStatus
from jinn.ops.protocol import FloatArray, IntArray

_NGRAM_SIZES = (4, 3)  # tried in turn; shorter ones are right too seldom to pay for their check
_TENANT = ""  # of a draft model's blocks, none of which are shared


class Drafter(Protocol):
    """Where drafts come from."""

    def draft(self, chunks: SequenceOf[Chunk]) -> None:
        """Set `drafts` of the sequences that generate next. `chunks` are all that the last step computed."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        ...


class NgramDrafter:
    """What followed the last few tokens when they occurred before (prompt lookup)."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._histories: dict[Sequence, History] = {}

    def draft(self, chunks: SequenceOf[Chunk]) -> None:
        """See `Drafter`."""
        for chunk in _generating(chunks):
            sequence = chunk.sequence
            history = self._histories.get(sequence)
            if history is None:
                history = self._histories[sequence] = History(self._num_tokens, sequence.prompt_ids.tolist())
            else:
                history.judge(chunk.drafts, sequence)
            history.extend(sequence.output_ids[len(history.token_ids) - sequence.num_prompt_tokens :])
            sequence.drafts = history.continuation()

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        self._histories.pop(sequence, None)


@dataclass(slots=True)
class History:
    """A sequence's tokens, and where each run of a few of them last ended."""

    max_drafts: int
    token_ids: list[int]
    num_indexed: int = 0  # tokens at which the runs that end are known
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_drafts: int = 0  # to give next: more while all are right, fewer when none is

    def __post_init__(self) -> None:
        self.num_drafts = self.max_drafts

    def extend(self, token_ids: list[int]) -> None:
        self.token_ids += token_ids

    def judge(self, drafts: tuple[int, ...], sequence: Sequence) -> None:
        """Learn from how many of the last drafts were right."""
        if not drafts:
            return
        num_right = len(sequence.output_ids) + sequence.num_prompt_tokens - len(self.token_ids) - 1
        if num_right == len(drafts):
            self.num_drafts = min(2 * self.num_drafts, self.max_drafts)
        elif not num_right:
            self.num_drafts = max(self.num_drafts // 2, 1)

    def continuation(self) -> tuple[int, ...]:
        """What came after the last tokens before; past the end of the text it goes on as it went."""
        tokens, size = self.token_ids, len(self.token_ids)
        for end in range(self.num_indexed, size):  # not at `size`: the last run must not find itself
            for length in _NGRAM_SIZES:
                if end >= length:
                    self.ends[tuple(tokens[end - length : end])] = end
        self.num_indexed = size
        for length in _NGRAM_SIZES:
            if start := self.ends.get(tuple(tokens[-length:])):
                period = size - start
                return tuple(tokens[start + i % period] for i in range(self.num_drafts))
        return ()


class ModelDrafter:
    """A smaller model's own next tokens, drawn with the keys of those that they guess at.

    Its keys and values lie in blocks of its own: a sequence without room goes without drafts.
    """

    def __init__(self, runner: Runner, num_tokens: int, max_num_batched_tokens: int) -> None:
        self._runner = runner
        self._num_tokens = num_tokens
        self._max_num_batched_tokens = max_num_batched_tokens
        self._cache = BlockCache(runner.num_blocks, runner.block_size, runner.copy_block)
        self._read: dict[Sequence, ReadTokens] = {}

    def draft(self, chunks: SequenceOf[Chunk]) -> None:
        """See `Drafter`."""
        sequences = [chunk.sequence for chunk in _generating(chunks) if self._make_room(chunk.sequence)]
        for sequence in sequences:
            self._catch_up(sequence)
        drafts: dict[Sequence, tuple[int, ...]] = dict.fromkeys(sequences, ())
        for _ in range(self._num_tokens):
            if not sequences:
                break
            for sequence, token in zip(sequences, self._step(sequences, drafts), strict=True):
                if token.error is None:
                    drafts[sequence] += (token.token_id,)
            sequences = [s for s in sequences if _can_follow(s, drafts[s])]
        for sequence, guessed in drafts.items():
            sequence.drafts = guessed

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""
        if read := self._read.pop(sequence, None):
            self._cache.release(read.table, keep=False)

    def _make_room(self, sequence: Sequence) -> bool:
        read = self._read.get(sequence)
        if read is None:
            read = self._read[sequence] = ReadTokens(self._cache.acquire(_TENANT, sequence.prompt_ids[:0]))
        return self._cache.allocate(read.table, sequence.num_tokens + self._num_tokens)

    def _catch_up(self, sequence: Sequence) -> None:
        """Read all but the last token that the sequence has and this model has not read."""
        read = self._read[sequence]
        known = sequence.token_ids(0, sequence.num_tokens)
        start = read.keep_common(known.tolist())
        while start < len(known) - 1:
            stop = min(start + self._max_num_batched_tokens, len(known) - 1)
            self._runner.step(pack([known[start:stop]], [start], [read.table.blocks], []), ())
            start = stop
        read.token_ids = known[:-1].tolist()

    def _step(
        self, sequences: list[Sequence], drafts: dict[Sequence, tuple[int, ...]]
    ) -> SequenceOf[SampledToken]:
        """Read the last token of each, and draw the one after it."""
        tokens, starts, blocks = [], [], []
        for sequence in sequences:
            read = self._read[sequence]
            last = drafts[sequence][-1] if drafts[sequence] else sequence.last_token_id
            tokens.append(np.array([last], np.int32))
            starts.append(len(read.token_ids))
            blocks.append(read.table.blocks)
            read.token_ids.append(last)
        rows = [sequence.sample_row(drafts[sequence]) for sequence in sequences]
        return self._runner.step(pack(tokens, starts, blocks, range(len(tokens))), rows)


@dataclass(slots=True)
class ReadTokens:
    """The tokens whose keys and values a draft model has stored in a table."""

    table: BlockTable
    token_ids: list[int] = field(default_factory=list)

    def keep_common(self, token_ids: list[int]) -> int:
        """How many of the tokens read are also the first of `token_ids`; the others count as not read."""
        size = min(len(self.token_ids), len(token_ids) - 1)
        while self.token_ids[:size] != token_ids[:size]:
            size -= 1  # only the last few can differ: drafts that were wrong
        return size


class MtpDrafter:
    """The model's own multi-token prediction module, fed with its hidden states; a chain for several tokens.

    Pair (hidden state of position p, token of position p + 1) has its key and value in p's place in the
    blocks, in a layer of its own. Pairs of a cached prefix keep those they had.
    """

    def __init__(self, runner: Runner, num_tokens: int) -> None:
        self._runner = runner
        self._num_tokens = num_tokens
        self._block_size = runner.block_size

    def draft(self, chunks: SequenceOf[Chunk]) -> None:
        """See `Drafter`."""
        hidden = self._runner.last_hidden()
        if len(hidden) != sum(chunk.num_tokens for chunk in chunks):
            return  # the step was computed in parts, and only the last one's hidden states are there
        pairs = list(_pairs(chunks, hidden))
        if not pairs:
            return
        drafts = self._predict(pairs)
        for _ in range(1, self._num_tokens):
            drafts = self._lengthen(drafts)
        for draft in drafts:
            draft.sequence.drafts = draft.token_ids

    def forget(self, sequence: Sequence) -> None:
        """See `Drafter`."""

    def _predict(self, pairs: list[Pairs]) -> list[Draft]:
        """Compute all pairs; the first draft of each sequence that generates next."""
        ends = np.cumsum([len(p.token_ids) for p in pairs])
        wanted = [i for i, p in enumerate(pairs) if p.sequence.num_uncomputed_tokens == 1]
        batch = pack(
            [p.token_ids for p in pairs],
            [p.start for p in pairs],
            [p.sequence.table.blocks for p in pairs],
            (ends - 1)[wanted].tolist(),
        )
        batch = replace(batch, hidden=np.concatenate([p.hidden for p in pairs]))
        sequences = [pairs[i].sequence for i in wanted]
        drawn = self._runner.predict(batch, [sequence.sample_row() for sequence in sequences])
        rows = self._runner.last_hidden()[(ends - 1)[wanted]]
        return [
            Draft(sequence, (token.token_id,), row)
            for sequence, token, row in zip(sequences, drawn, rows, strict=True)
            if token.error is None
        ]

    def _lengthen(self, drafts: list[Draft]) -> list[Draft]:
        """Each draft with one more token, where it can have one."""
        going = [d for d in drafts if _can_follow(d.sequence, d.token_ids) and self._has_room(d)]
        if not going:
            return drafts
        batch = pack(
            [np.array(d.token_ids[-1:], np.int32) for d in going],
            [d.sequence.num_computed_tokens + len(d.token_ids) - 1 for d in going],
            [d.sequence.table.blocks for d in going],
            range(len(going)),
        )
        batch = replace(batch, hidden=np.stack([d.hidden for d in going]))
        drawn = self._runner.predict(batch, [d.sequence.sample_row(d.token_ids) for d in going])
        for draft, token, row in zip(going, drawn, self._runner.last_hidden().copy(), strict=True):
            if token.error is None:
                draft.token_ids, draft.hidden = (*draft.token_ids, token.token_id), row
        return drafts

    def _has_room(self, draft: Draft) -> bool:
        """Whether the pair that draws the next token has a place in the sequence's blocks."""
        table = draft.sequence.table
        return (
            draft.sequence.num_computed_tokens + len(draft.token_ids) <= table.num_blocks * self._block_size
        )


@dataclass(frozen=True, slots=True)
class Pairs:
    """Consecutive positions of a sequence that the model has computed, each with the token after it."""

    sequence: Sequence
    start: int
    token_ids: IntArray  # of positions start + 1, ...
    hidden: FloatArray  # [len(token_ids), hidden_size] of positions start, ...


@dataclass(slots=True)
class Draft:
    """Drafts of a sequence that generates next, and the module's hidden state of the last."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    hidden: FloatArray  # [hidden_size]


def _pairs(chunks: SequenceOf[Chunk], hidden: FloatArray) -> Iterator[Pairs]:
    """Of the tokens of a step that are right, of all sequences that go on; `hidden` has a row per token."""
    offset = 0
    for chunk in chunks:
        sequence = chunk.sequence
        if sequence.status is SequenceStatus.RUNNING:
            start, stop = chunk.start, sequence.num_computed_tokens
            rows = hidden[offset : offset + stop - start]
            yield Pairs(sequence, start, sequence.token_ids(start + 1, stop + 1), rows)
        offset += chunk.num_tokens


def _generating(chunks: SequenceOf[Chunk]) -> list[Chunk]:
    """Those whose sequences draw a token with the next step too."""
    return [
        chunk
        for chunk in chunks
        if chunk.sequence.status is SequenceStatus.RUNNING and chunk.sequence.num_uncomputed_tokens == 1
    ]


def _can_follow(sequence: Sequence, drafts: tuple[int, ...]) -> bool:
    """Whether a further draft could be taken: the answer would not have ended by then."""
    return sequence.num_tokens + len(
        drafts
    ) + 1 < sequence.max_num_tokens and not sequence.ending_ids.intersection(drafts)
