"""Text out of a stream of token ids, and the stop strings that end it.

Both give what one pass over the whole stream would give, however it is cut, and never take text back.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from jinn.text.tokenizer import Tokenizer


class Detokenizer:
    """Gives each code point once its last byte has come; all it gives, joined, is `decode` of all ids.

    With `skip_special` it leaves control tokens out, but for `shown`, which are named by their text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, shown: Iterable[str] = ()) -> None:
        self._token_bytes = tokenizer.token_bytes
        shown_ids = {tokenizer.added_tokens[text].id for text in shown if text in tokenizer.added_tokens}
        self._skipped_ids = tokenizer.special_ids - shown_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that `token_ids` complete; bytes of an unfinished code point wait."""
        skipped = self._skipped_ids
        return self._decoder.decode(b"".join(self._token_bytes(i) for i in token_ids if i not in skipped))

    def flush(self) -> str:
        """What still waits at the end of the stream: U+FFFD for a cut code point, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Holds back text that may be the start of a stop string until that is decided.

    The first stop string to be complete ends the text before it; of several that one character completes, the
    longest. An Aho-Corasick automaton reads each character once, whatever the stop strings.

    Attributes:
        matched: the stop string that was found, or None.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if not all(stop):
            raise ValueError("stop must hold non-empty strings")
        self.matched: str | None = None
        self._held = ""
        self._state = 0
        # A state is a prefix of some stop string. Of each: the next states, the length, the longest stop
        # string that it ends with, and the state of its longest proper suffix.
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match = [""]
        for text in stop:
            self._add(text)
        self._suffix = self._link_suffixes()

    def push(self, text: str) -> tuple[str, bool]:
        """The text now decided, and whether a stop string ended it. After that, nothing more comes."""
        if self.matched is not None:
            return "", True
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            self._state = self._step(self._state, char)
            if match := self._match[self._state]:
                self.matched, self._held = match, ""
                return pending[: position - len(match)], True
        decided = len(pending) - self._depth[self._state]
        self._held = pending[decided:]
        return pending[:decided], False

    def flush(self) -> str:
        """What is still held at the end of the stream."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, text: str) -> None:
        state = 0
        for char in text:
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._match.append("")
            state = self._next[state][char]
        self._match[state] = text

    def _link_suffixes(self) -> list[int]:
        """Breadth first, so that a state's suffix, which is shorter, is linked before it."""
        self._suffix = suffix = [0] * len(self._next)
        queue = list(self._next[0].values())
        for state in queue:
            for char, child in self._next[state].items():
                suffix[child] = self._step(suffix[state], char)
                self._match[child] = self._match[child] or self._match[suffix[child]]
                queue.append(child)
        return suffix

    def _step(self, state: int, char: str) -> int:
        while state and char not in self._next[state]:
            state = self._suffix[state]
        return self._next[state].get(char, 0)
