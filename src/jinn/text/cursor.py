"""Reads text that arrives in pieces, so that a parser may be written as if all of it were there.

A parser is a generator: it yields what it has found, and None where it waits for more text. What it finds
never depends on how the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from jinn.text.message import Part
from jinn.text.tokenizer import match_any

T = TypeVar("T")
R = TypeVar("R")

Steps = Generator[Part | None, None, R]
"""Yields parts, and None to wait for more text."""

Wait = Generator[None, None, R]

_MAX_MARKED_CHARS = 1024


class Tags:
    """Texts to look for. None may be a part of another, but for its end."""

    def __init__(self, *texts: str) -> None:
        if any(a != b and a in b[:-1] for a in texts for b in texts):
            raise ValueError(f"one of {texts} is a part of another, so that they cannot be told apart")
        self.texts = texts
        self.pattern = re.compile(match_any(texts))
        self._heads = frozenset(text[:length] for text in texts for length in range(1, len(text)))
        self._reach = max(map(len, texts), default=1) - 1

    def num_undecided(self, text: str, start: int) -> int:
        """Characters at the end of `text[start:]` that may begin one of the texts."""
        for length in range(min(self._reach, len(text) - start), 0, -1):
            if text[-length:] in self._heads:
                return length
        return 0


NO_TAGS = Tags()


class Cursor:
    """A place in the text. Text before it is forgotten, unless it is marked."""

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._mark: int | None = None
        self._is_ended = False

    def push(self, text: str) -> None:
        start = self._position if self._mark is None else self._mark
        self._text = self._text[start:] + text
        self._position -= start
        if self._mark is not None:
            self._mark = 0

    def end(self) -> None:
        """No more text will come."""
        self._is_ended = True

    def mark(self) -> None:
        """Remember this place for `rewind`. The text since is copied at each push: look out for `is_far`."""
        self._mark = self._position

    def rewind(self) -> None:
        """Go back to the mark, and forget it."""
        if self._mark is not None:
            self._position, self._mark = self._mark, None

    def unmark(self) -> None:
        self._mark = None

    @property
    def is_far(self) -> bool:
        """Whether the mark is further back than anything worth going back for."""
        return self._mark is not None and self._position - self._mark > _MAX_MARKED_CHARS

    def peek(self) -> Wait[str]:
        """The next character; empty at the end."""
        while self._position == len(self._text) and not self._is_ended:
            yield
        return self._text[self._position : self._position + 1]

    def take(self) -> Wait[str]:
        """The next character, and step over it."""
        char = yield from self.peek()
        self._position += len(char)
        return char

    def space(self) -> Wait[str]:
        """Step over white space, and return it."""
        taken = []
        while (yield from self.peek()).isspace() and not self.is_far:
            taken.append((yield from self.take()))
        return "".join(taken)

    def literal(self, text: str) -> Wait[bool]:
        """Step over `text` if it comes next; else stay."""
        while not self._text.startswith(text, self._position):
            rest = len(self._text) - self._position
            if self._is_ended or rest >= len(text) or not text.startswith(self._text[self._position :]):
                return False
            yield
        self._position += len(text)
        return True

    def until(self, tags: Tags) -> Generator[str | None, None, str]:
        """Yield the text before the next tag as soon as it is decided; return the tag, or "" at the end."""
        while True:
            text, position = self._text, self._position
            if match := tags.pattern.search(text, position):
                self._position = match.end()
                if match.start() > position:
                    yield text[position : match.start()]
                return match[0]
            decided = len(text) if self._is_ended else len(text) - tags.num_undecided(text, position)
            self._position = decided
            if decided > position:
                yield text[position:decided]
            if self._is_ended:
                return ""
            if self._text is text:
                yield None


def each(make: Callable[[str], Part | None], texts: Generator[str | None, None, R]) -> Steps[R]:
    """The texts of `Cursor.until` as parts."""
    while True:
        try:
            text = next(texts)
        except StopIteration as stop:
            returned: R = stop.value
            return returned
        if text is None:
            yield None
        elif (part := make(text)) is not None:
            yield part


def collect(texts: Generator[str | None, None, str]) -> Wait[tuple[str, str]]:
    """All text before the tag, and the tag."""
    taken: list[str] = []
    while True:
        try:
            text = next(texts)
        except StopIteration as stop:
            return "".join(taken), stop.value
        if text is None:
            yield
        else:
            taken.append(text)


class Running:
    """A parser at work: text in, parts out."""

    def __init__(self, cursor: Cursor, steps: Steps[None]) -> None:
        self._cursor = cursor
        self._steps = steps

    def push(self, text: str) -> list[Part]:
        """What `text` completes."""
        self._cursor.push(text)
        return self._run()

    def flush(self) -> list[Part]:
        """What was held back, now that no more text comes."""
        self._cursor.end()
        return self._run()

    def _run(self) -> list[Part]:
        return list(iter(lambda: next(self._steps, None), None))
