"""Keeps what users write from becoming added tokens, by marks that a chat template carries through unseen.

A mark is one code point that occurs nowhere in the conversation. It goes inside each added token
that a text spells. It also goes to the end of a text that ends as a token begins, to the start of one that
starts as a token ends, and to one that is the middle of a token, since a template may complete them. Whoever
splits the rendered text at the tokens still whole, and then strips the marks, finds only tokens that the
template wrote.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jinn.text.tokenizer import AddedToken, TokenKind, match_any

# Signs of Linear A, which hardly a text holds: printable, so that a list's repr shows them as they are. Then
# noncharacters, and private use for a conversation that holds them all.
_CANDIDATES = (*range(0x10600, 0x10620), *range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE))
LIKELY_MARKS = "\U00010600-\U0001061f\ufdd0-\ufdef"  # within a pattern's brackets


class Marker:
    """Marks the texts of one conversation.

    Args:
        added_tokens: the tokenizer's.
        words: what the template may compare text with or look up by. A text that is one of them and the
            middle of a token (`name` in `<repo_name>`) stays as it is.
        conversation: all that will be marked.

    Raises ValueError where no code point is free, or an added token has no inside to mark.
    """

    def __init__(
        self, added_tokens: Mapping[str, AddedToken], words: frozenset[str], conversation: object
    ) -> None:
        self._char, self._end = _free_chars(conversation)
        self._words = words
        control = (text for text, token in added_tokens.items() if token.kind is TokenKind.CONTROL)
        self._any = _spellings(tuple(added_tokens))
        self._control = _spellings(tuple(control))
        self._user_defined = _spellings(
            tuple(text for text, token in added_tokens.items() if token.kind is TokenKind.USER_DEFINED)
        )

    def mark(self, value: Any) -> Any:
        """A copy of plain data in which no text, key or value, may become an added token."""
        return _map_texts(value, self._mark_text)

    def mark_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`mark`, but assistants may use user-defined tokens, and templates build tokens around the role."""
        mark_text = self._mark_assistant if message["role"] == "assistant" else self._mark_text
        marked: dict[str, Any] = _map_texts(message, mark_text)
        return {**marked, "role": self._any.mark_whole(message["role"], self._char)}

    def mark_end(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The marked message, with a mark of its own and a space at the end of its content, for `cut`."""
        return {**message, "content": f"{message['content']}{self._end} "}

    def cut(self, text: str) -> str | None:
        """The text up to the mark at a message's end; None where it was lost.

        Where the space behind it was trimmed, so is the white space before it, as in transformers.
        """
        before, mark, after = text.rpartition(self._end)
        if not mark:
            return None
        return before if after.startswith(" ") else before.rstrip()

    def strip(self, text: str) -> str:
        """The text without marks."""
        return text.replace(self._char, "").replace(self._end, "")

    def _mark_text(self, text: str) -> str:
        return self._mark_edges(self._any.mark_whole(text, self._char), self._any)

    def _mark_assistant(self, text: str) -> str:
        # A template may cut the text at these tokens, or drop them, so each piece has edges of its own.
        pieces = self._user_defined.pieces(self._control.mark_whole(text, self._char))
        return "".join(
            piece if index % 2 else self._mark_edges(piece, self._control)
            for index, piece in enumerate(pieces)
        )

    def _mark_edges(self, text: str, spellings: _Spellings) -> str:
        # Inside the white space around it, which templates trim.
        core = text.strip() or text
        start = text.index(core)
        starts = spellings.starts_as_one_ends(core) or spellings.starts_as_one_ends(text)
        ends = spellings.ends_as_one_starts(core) or spellings.ends_as_one_starts(text)
        if not ends and core not in self._words:
            ends = spellings.is_middle(core)
        return text[:start] + self._char * starts + core + self._char * ends + text[start + len(core) :]


class _Spellings:
    """Where texts spell any of a set of tokens, wholly or in part."""

    def __init__(self, tokens: tuple[str, ...]) -> None:
        if short := [token for token in tokens if len(token) < 2]:
            raise ValueError(f"the added token {short[0]!r} is one character, which has no inside to mark")
        pattern = match_any(tokens)
        self._whole = re.compile(pattern)
        self._first_char = re.compile(f"(?={pattern}).", re.DOTALL)
        self._captured = re.compile(f"({pattern})")
        self._heads = frozenset(token[:length] for token in tokens for length in range(1, len(token)))
        self._tails = frozenset(token[start:] for token in tokens for start in range(1, len(token)))
        self._joined = "\0".join(tokens)
        self._reach = max(map(len, tokens), default=1) - 1

    def mark_whole(self, text: str, mark: str) -> str:
        """A mark after the first character of each token, overlapping ones included."""
        return self._first_char.sub(rf"\g<0>{mark}", text) if self._whole.search(text) else text

    def pieces(self, text: str) -> list[str]:
        """What lies between the tokens at even places, the tokens at odd ones."""
        return self._captured.split(text)

    def ends_as_one_starts(self, text: str) -> bool:
        tail = text[max(0, len(text) - self._reach) :]
        return any(tail[start:] in self._heads for start in range(len(tail)))

    def starts_as_one_ends(self, text: str) -> bool:
        head = text[: self._reach]
        return any(head[:length] in self._tails for length in range(1, len(head) + 1))

    def is_middle(self, text: str) -> bool:
        return 0 < len(text) < self._reach and text in self._joined


@functools.lru_cache(maxsize=16)
def _spellings(tokens: tuple[str, ...]) -> _Spellings:
    return _Spellings(tokens)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(key, change): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _free_chars(conversation: object) -> tuple[str, str]:
    used: set[str] = set().union(*_texts(conversation))
    free = (char for char in map(chr, _CANDIDATES) if char not in used)
    try:
        return next(free), next(free)
    except StopIteration:
        raise ValueError("the conversation holds every code point that could mark its texts") from None
