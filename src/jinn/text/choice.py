"""One choice of an answer: token ids in, deltas of text out. `finish_reason` is decided here."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jinn.engine.messages import FinishReason, SamplingParams, TokenLogprobs, TokenOutput
from jinn.text.detokenizer import Detokenizer, StopStrings
from jinn.text.message import Part, merge
from jinn.text.message_parser import MessageParser
from jinn.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token with its log-probabilities (None for the first of a prompt) and its place, in characters."""

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Delta:
    """What a choice gained since its last delta. The last one carries `finish_reason`.

    `text` is as generated; `parts` is what it adds to the message, where the choice is read as one.
    """

    index: int
    text: str
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: str | None = None  # stop | length | tool_calls
    parts: tuple[Part, ...] = ()
    stop_string: str | None = None  # that ended the choice


class Choice:
    """Text of half a character, or that may begin a stop string, is held back until it is decided."""

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        text_offset: int = 0,
        parser: MessageParser | None = None,
    ) -> None:
        """`text_offset` is the length of what the choice begins with before its first token."""
        self.index = index
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.is_finished = False
        self._min_tokens = sampling.min_tokens
        self._parser = parser
        self._parts: list[Part] = []
        self._detokenizer = Detokenizer(tokenizer, shown=parser.control_texts if parser else ())
        self._stop = StopStrings(sampling.stop) if sampling.stop else None
        self._entries: deque[TokenEntry] = deque()
        self._num_decoded = text_offset  # characters
        self._num_emitted = text_offset

    @property
    def is_stopped_by_text(self) -> bool:
        return self._stop is not None and self._stop.matched is not None

    def take(self, output: TokenOutput) -> Delta | None:
        """The delta for one output; None while all of its text is held back."""
        reason = output.finish_reason
        # An end-of-sequence or stop id ends the sequence; its text is not part of the answer.
        num_text_ids = len(output.token_ids) - (reason is FinishReason.STOP)
        text = ""
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            if position < num_text_ids:
                if output.logprobs:
                    self._entries.append(TokenEntry(token_id, self._num_decoded, output.logprobs[position]))
                text += self._read(self._decide(self._detokenizer.push((token_id,))))
                if self.is_stopped_by_text or (self._parser and self._parser.is_finished):
                    return self._finish(text, FinishReason.STOP)
        if reason is not None:
            return self._finish(text + self._read(self._flush()), reason)
        entries = self._decided_entries(len(text))
        return Delta(self.index, text, entries, parts=self._take_parts()) if text or entries else None

    def _read(self, text: str) -> str:
        """Pass decided text on to the parser. Returns it."""
        if self._parser is not None:
            was_reasoning = self._parser.is_reasoning
            self._parts += self._parser.push(text)
            if was_reasoning or self._parser.is_reasoning:
                self.num_reasoning_tokens = self.num_tokens
        return text

    def _take_parts(self) -> tuple[Part, ...]:
        parts, self._parts = merge(self._parts), []
        return tuple(parts)

    def _decide(self, text: str) -> str:
        """The part of the held and the new text that is surely not part of a stop string."""
        self._num_decoded += len(text)
        if self._stop is None or self.num_tokens < self._min_tokens:
            return text
        return self._stop.push(text)[0]

    def _flush(self) -> str:
        text = self._decide(self._detokenizer.flush())
        return text if self._stop is None else text + self._stop.flush()

    def _finish(self, text: str, reason: FinishReason) -> Delta:
        self.is_finished = True
        entries = self._decided_entries(len(text))
        if self.is_stopped_by_text:
            reason = FinishReason.STOP
        else:
            entries += tuple(self._entries)
        if self._parser is not None:
            self._parts += self._parser.flush()
        has_called = self._parser is not None and self._parser.num_calls > 0
        finish_reason = "tool_calls" if has_called and reason is FinishReason.STOP else reason.value
        stop_string = None if self._stop is None else self._stop.matched
        return Delta(self.index, text, entries, finish_reason, self._take_parts(), stop_string)

    def _decided_entries(self, num_characters: int) -> tuple[TokenEntry, ...]:
        """The tokens that begin within the emitted text."""
        self._num_emitted += num_characters
        entries = []
        while self._entries and self._entries[0].text_offset < self._num_emitted:
            entries.append(self._entries.popleft())
        return tuple(entries)


def echoed_entries(
    text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> tuple[TokenEntry, ...]:
    """The tokens of a prompt of this text, with the log-probabilities of all but the first."""
    entries, num_characters = [], 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token_id, entry in zip(token_ids, (None, *logprobs), strict=True):
        entries.append(TokenEntry(token_id, num_characters, entry))
        raw = tokenizer.token_bytes(token_id)
        # the text may lack what the tokenizer puts first, and control tokens
        if token_id not in tokenizer.special_ids or text.startswith(
            raw.decode(errors="replace"), num_characters
        ):
            num_characters += len(decoder.decode(raw))
    return tuple(entries)
