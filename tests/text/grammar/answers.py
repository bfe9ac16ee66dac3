"""Answers to a grammar from a model that knows nothing: a walk over single bytes."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import llguidance
import numpy as np

from jinn.engine.constraint import parser_limits
from jinn.text.grammar.worker import TOKENIZER, TOKENS

END = TOKENIZER.eos_token
_CLOSING = frozenset(b'"}]')


def matcher_of(text: str) -> llguidance.LLMatcher:
    return llguidance.LLMatcher(TOKENIZER, text, log_level=0, limits=parser_limits())


def walk(matcher: llguidance.LLMatcher, rng: random.Random, max_bytes: int = 600) -> tuple[bytes, str]:
    """An answer, and "stop", "length" or "dead end". It tends to close what is open, more so when long."""
    answer = bytearray()
    while len(answer) < max_bytes:
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        ids = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        can_end = matcher.is_accepting()
        if matcher.is_error() or not (can_end or set(ids) - {END}):
            return bytes(answer), "dead end"
        choices = [i for i in ids if i != END]
        if can_end and (not choices or rng.random() < 0.3 or len(answer) > max_bytes // 2):
            return bytes(answer), "stop"
        closing = [i for i in choices if i in _CLOSING]
        is_long = len(answer) > max_bytes // 3
        if closing and rng.random() < (0.7 if is_long else 0.15):
            choices = closing
        token_id = rng.choice(choices)
        matcher.consume_token(token_id)
        answer += TOKENS[token_id]
    return bytes(answer), "length"


def accepts(text: str, answer: str) -> bool:
    """Whether the grammar takes the whole answer."""
    matcher = matcher_of(text)
    ids = list(answer.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def parsed(answer: bytes) -> Any:
    """The JSON value; numbers beyond a double, which JSON allows, are the largest double."""

    def finite(text: str) -> float:
        return max(min(float(text), sys.float_info.max), -sys.float_info.max)

    return json.loads(answer, parse_float=finite)
