"""Holds sequences to grammars: which ids may come next. llguidance reads grammars and computes masks.

Masks are computed in a thread of their own, beside the forward pass, since llguidance releases the
interpreter lock. Imported only once a request has a grammar.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import TYPE_CHECKING, cast

import llguidance
import numpy as np

from jinn.engine.messages import GRAMMAR_ERROR
from jinn.engine.sampler import IdBits

if TYPE_CHECKING:
    from jinn.text.tokenizer import Tokenizer


class GrammarError(ValueError):
    """A grammar that cannot be compiled, in one line."""


def parser_limits() -> llguidance.LLParserLimits:
    """What a grammar may cost to read, and at each token; a millisecond burns about 50 000 of fuel."""
    return llguidance.LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=10_000,
        max_grammar_size=500_000,
        precompute_large_lexemes=True,
        verbose_errors=False,
    )


class Vocabulary:
    """A model's tokens as llguidance knows them.

    `vocab_size` is the number of logits; ids without text, and those of control tokens, are in no grammar.
    Every id of `eos_token_ids` may end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        wrapper = _Wrapper(tokenizer, vocab_size, min(eos_token_ids))
        self._tokenizer = llguidance.LLTokenizer(
            cast(llguidance.TokenizerWrapper, wrapper), eos_token=sorted(eos_token_ids)
        )

    def compile(self, text: str) -> llguidance.LLMatcher:
        """A matcher at the grammar's start. Raises GrammarError."""
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise GrammarError(first_line(matcher.get_error()))
        return matcher


class _Wrapper:
    """What llguidance asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        texts = tokenizer.vocabulary()[:vocab_size]
        self.tokens = texts + [b""] * (vocab_size - len(texts))
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.eos_token_id = eos_token_id
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """How the model itself would write text that the grammar leaves no choice about."""
        return self._tokenizer.encode(text, parse_special=False, add_bos=False)


class Constraint:
    """Where one sequence stands in a grammar that `origin` is at the start of.

    The grammar begins after the id `after_id`; at once where that is None, or where an `opening_id` is given
    and does not come first. Until it begins, anything but an end may come. Stop ids are further ends: like
    the vocabulary's own, they may come exactly where the answer may end. Masks are computed by `executor`,
    which must have one thread.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        origin: llguidance.LLMatcher,
        executor: Executor,
        *,
        stop_token_ids: Collection[int] = (),
        after_id: int | None = None,
        opening_id: int | None = None,
    ) -> None:
        self.error: str | None = None  # why nothing more may come
        self._origin = origin
        self._matcher = origin.deep_copy()
        self._executor = executor
        self._taken_ids: list[int] = []  # by the grammar
        self._num_words = (vocabulary.vocab_size + 31) // 32
        self._ending_ids = {*vocabulary.eos_token_ids, *stop_token_ids}
        self._ends = packed(self._ending_ids, vocabulary.vocab_size)
        self._after_id = after_id
        self._opening_id = opening_id  # until the first id
        self._has_begun = after_id is None or opening_id is not None

    def start_masks(
        self, draft_ids: Sequence[int] = (), forced: Collection[int] = ()
    ) -> list[Callable[[], IdBits]]:
        """Begin to compute `masks`. The answer has a function per row, which waits for it."""
        future = self._executor.submit(self.masks, tuple(draft_ids), forced)
        return [partial(_row, future, index) for index in range(len(draft_ids) + 1)]

    def masks(self, draft_ids: Sequence[int] = (), forced: Collection[int] = ()) -> IdBits:
        """What may come next, and what after each draft: [1 + len(draft_ids), ceil(vocab_size / 32)].

        Row i is as if drafts 0 to i - 1 had been taken; it is empty where one of them may not come, or is an
        end. Row 0 is empty in a dead end, or where going on would cost too much; `error` says so. `forced`
        are the indices of drafts that come whatever the grammar says; see `advance`.
        """
        rows = np.zeros((len(draft_ids) + 1, self._num_words), np.uint32)
        self.error = self._fill(rows[0])
        num_taken, has_begun, opening_id = len(self._taken_ids), self._has_begun, self._opening_id
        for index, draft_id in enumerate(draft_ids):
            is_forced = index in forced
            may_come = is_forced or bool(rows[index][draft_id // 32] >> (draft_id % 32) & 1)
            if draft_id in self._ending_ids or not may_come:
                break
            self.advance(draft_id, is_forced=is_forced)
            if self._fill(rows[index + 1]) is not None:
                break
        self._withdraw(len(self._taken_ids) - num_taken)
        self._has_begun, self._opening_id = has_begun, opening_id
        return rows

    def advance(self, token_id: int, *, is_forced: bool = False) -> None:
        """Take an id that may come and is no end. What is forced is no part of a grammar that has begun."""
        opening_id, self._opening_id = self._opening_id, None
        if opening_id is not None and token_id == opening_id:
            self._has_begun = False
        elif not self._has_begun:
            self._has_begun = token_id == self._after_id
        elif not is_forced:
            self._taken_ids.append(token_id)
            self._matcher.consume_token(token_id)  # where it fails, the next mask tells

    def _fill(self, bits: IdBits) -> str | None:
        """Set the bits of what may come now, or say why nothing may."""
        if not self._has_begun:
            np.invert(self._ends, out=bits)
            return None
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        can_end = matcher.is_accepting()
        if not can_end:
            bits &= ~self._ends
        if (
            matcher.is_error() or not bits.any()
        ):  # llguidance then gives the ends, as if the answer were whole
            bits[:] = 0
            return f"{GRAMMAR_ERROR}: {first_line(matcher.get_error()) or 'a dead end'}"
        if can_end:
            bits |= self._ends
        if self._opening_id is not None:
            bits[self._opening_id // 32] |= np.uint32(1 << self._opening_id % 32)
        return None

    def _withdraw(self, num_ids: int) -> None:
        """Forget the ids that were taken last."""
        if not num_ids:
            return
        del self._taken_ids[-num_ids:]
        if self._matcher.is_error() or not self._matcher.rollback(num_ids):
            self._matcher = self._origin.deep_copy()
            self._matcher.consume_tokens(self._taken_ids)


def packed(token_ids: Collection[int], vocab_size: int) -> IdBits:
    """The set of these ids."""
    is_member = np.zeros((vocab_size + 31) // 32 * 32, np.bool_)
    is_member[list(token_ids)] = True
    return np.packbits(is_member, bitorder="little").view(np.uint32)


def first_line(text: str) -> str:
    """llguidance's messages go on with the state of its parser."""
    return text.strip().partition("\n")[0]


def _row(masks: Future[IdBits], index: int) -> IdBits:
    row: IdBits = masks.result()[index]
    return row
