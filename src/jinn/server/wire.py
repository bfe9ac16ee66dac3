"""The pieces of OpenAI's wire format that several APIs share."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinn.server.errors import APIError
from jinn.server.generation import PromptProgress, Usage
from jinn.text.choice import TokenEntry

TokenBytes = Callable[[int], bytes]

# ASCII only: some clients split lines at U+2028 and its like.
to_json = json.JSONEncoder(separators=(",", ":")).encode

DONE = "data: [DONE]\n\n"

_LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every chunk of an answer repeats."""

    id: str
    created: int  # Unix seconds
    model: str
    system_fingerprint: str

    @classmethod
    def create(cls, id_prefix: str, model: str, system_fingerprint: str) -> AnswerHead:
        return cls(f"{id_prefix}-{secrets.token_hex(12)}", int(time.time()), model, system_fingerprint)

    def fields(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class ChunkWire:
    """What the chunks of chat completions and of completions share. Chunks are joined from ready-made parts:
    there are many."""

    def __init__(self, head: AnswerHead, kind: str, seed: int | None, *, include_usage: bool) -> None:
        """`kind` is the chunks' `object`."""
        self._head = head
        self._seed = seed
        self._include_usage = include_usage
        self._begin = f"data: {to_json(head.fields(kind))[:-1]}"
        self._no_usage = ',"usage":null' if include_usage else ""

    def _event(self, choice: str, *, is_last: bool = False) -> str:
        """A chunk of one choice, given as JSON; a choice's last one names the seed."""
        seed = f',"seed":{self._seed}' if is_last else ""
        return f'{self._begin},"choices":[{choice}]{seed}{self._no_usage}}}\n\n'

    def progress(self, progress: PromptProgress) -> str:
        """A chunk without choices, by the names of llama.cpp."""
        fields = {
            "index": progress.prompt,
            "total": progress.num_prompt_tokens,
            "cache": progress.num_cached_tokens,
            "processed": progress.num_computed_tokens,
            "time_ms": round(progress.seconds * 1000),
        }
        return f'{self._begin},"choices":[],"prompt_progress":{to_json(fields)}{self._no_usage}}}\n\n'

    def last_chunk(self, usage: Usage) -> str:
        """The events after every choice has finished."""
        if not self._include_usage:
            return DONE
        return f'{self._begin},"choices":[],"usage":{to_json(usage_fields(usage))}}}\n\n{DONE}'

    def error(self, error: APIError) -> str:
        """What ends a stream that cannot go on."""
        return f"data: {error.encode().decode()}\n\n"

    def _answer(self, kind: str, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """A whole answer."""
        return {
            **self._head.fields(kind),
            "choices": choices,
            "usage": usage_fields(usage),
            "seed": self._seed,
        }


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.draft_tokens - usage.accepted_tokens,
        },
    }


def reading_usage_fields(usage: Usage) -> dict[str, int]:
    """The usage of what generates nothing."""
    return {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}


def tool_call_fields(call_id: str, name: str, arguments: str | dict[str, Any]) -> dict[str, Any]:
    """A whole call in a message."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def chat_logprobs(entries: Sequence[TokenEntry], token_bytes: TokenBytes) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""

    def fields(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        return {"token": token_text(raw), "logprob": max(logprob, _LOWEST_LOGPROB), "bytes": list(raw)}

    content = []
    for entry in entries:
        if entry.logprobs is not None:
            top = [fields(token_id, logprob) for token_id, logprob in entry.logprobs.top]
            content.append({**fields(entry.token_id, entry.logprobs.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[TokenEntry], token_bytes: TokenBytes) -> dict[str, Any]:
    """The `logprobs` of a completion choice; `top_logprobs` always holds the chosen token too."""

    def top(entry: TokenEntry) -> dict[str, float] | None:
        if entry.logprobs is None:
            return None
        pairs = (*entry.logprobs.top, (entry.token_id, entry.logprobs.logprob))
        return {token_text(token_bytes(i)): max(logprob, _LOWEST_LOGPROB) for i, logprob in pairs}

    return {
        "tokens": [token_text(token_bytes(entry.token_id)) for entry in entries],
        "token_logprobs": [
            None if entry.logprobs is None else max(entry.logprobs.logprob, _LOWEST_LOGPROB)
            for entry in entries
        ],
        "top_logprobs": list(map(top, entries)),
        "text_offset": [entry.text_offset for entry in entries],
    }


def token_text(raw: bytes) -> str:
    r"""A token's text; one that is no whole character is written as OpenAI does, `bytes:\xe2\x82`."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
