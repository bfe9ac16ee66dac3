"""Where what each message of a conversation says begins: up to there, others may share its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jinn.text.tokenizer import Tokenizer

# Control tokens that open a message, and what ends the header that they begin
_HEADERS = {
    "<|im_start|>": b"\n",
    "<|start_header_id|>": b"\n\n",
    "<｜User｜>": b"",
    "<｜Assistant｜>": b"",
}
_MAX_HEADER_TOKENS = 8


def turn_starts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> tuple[int, ...]:
    """The position after each header, ascending. None in text without the known control tokens."""
    ids = np.asarray(token_ids, np.int64)
    starts: list[int] = []
    for text, end in _HEADERS.items():
        if text in tokenizer.added_tokens:
            openers = np.flatnonzero(ids == tokenizer.added_tokens[text].id).tolist()
            starts += [_header_end(tokenizer, ids, opener + 1, end) for opener in openers]
    return tuple(sorted(starts))


def _header_end(tokenizer: Tokenizer, ids: np.ndarray, start: int, end: bytes) -> int:
    """The position after the first token that ends as the header does; `start` where none is near."""
    for position in range(start, min(start + _MAX_HEADER_TOKENS, len(ids)) if end else start):
        if tokenizer.token_bytes(int(ids[position])).endswith(end):
            return position + 1
    return start
