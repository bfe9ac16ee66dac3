"""How Anthropic's Messages API writes an answer and its errors: blocks, and the events in which they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from jinn.server.errors import APIError
from jinn.server.generation import Usage
from jinn.server.stream import FoldedChoice
from jinn.server.wire import to_json
from jinn.text.choice import Delta
from jinn.text.message import ContentDelta, Part, ReasoningDelta, ToolCallStart

Object = dict[str, Any]

_ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesWire:
    """Writes one message."""

    def __init__(self, message_id: str, model: str, num_prompt_tokens: int) -> None:
        self._message: Object = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(prompt_tokens=num_prompt_tokens)),
        }
        self._has_begun = False
        self._kind: str | None = None  # of the open block
        self._index = -1
        self._stop: Object = {}

    def chunk(self, delta: Delta) -> str:
        events = ""
        if not self._has_begun:
            self._has_begun = True
            events = _event("message_start", message=self._message)
        for part in delta.parts:
            events += "".join(self._add(part))
        if delta.finish_reason:
            self._stop = _stop(delta.finish_reason, delta.stop_string)
        return events

    def last_chunk(self, usage: Usage) -> str:
        events = "".join(self._close())
        events += _event("message_delta", delta=self._stop, usage=_usage(usage))
        return events + _event("message_stop")

    def answer(self, choices: list[FoldedChoice], usage: Usage) -> Object:
        (choice,) = choices
        message = choice.message
        content: list[Object] = []
        if message.reasoning:
            content.append({"type": "thinking", "thinking": message.reasoning, "signature": ""})
        if message.content:
            content.append({"type": "text", "text": message.content})
        for call in message.tool_calls:
            content.append(
                {"type": "tool_use", "id": call.id, "name": call.name, "input": _object(call.arguments)}
            )
        stop = _stop(choice.finish_reason, choice.stop_string)
        return {**self._message, "content": content, **stop, "usage": _usage(usage)}

    def error(self, error: APIError) -> str:
        return f"event: error\ndata: {encode_error(error).decode()}\n\n"

    def _add(self, part: Part) -> Iterator[str]:
        """The events for a part; one that does not continue the open block closes it and opens another."""
        kind = _kind(part)
        if isinstance(part, ToolCallStart) or kind != self._kind:
            yield from self._close()
            self._kind = kind
            self._index += 1
            yield _event("content_block_start", index=self._index, content_block=_empty_block(part))
        if not isinstance(part, ToolCallStart):
            yield _event("content_block_delta", index=self._index, delta=_delta(part))

    def _close(self) -> Iterator[str]:
        if self._kind is None:
            return
        if self._kind == "thinking":
            signature = {"type": "signature_delta", "signature": ""}
            yield _event("content_block_delta", index=self._index, delta=signature)
        yield _event("content_block_stop", index=self._index)
        self._kind = None


def encode_error(error: APIError) -> bytes:
    """An error in this API's form, which has no field of its own for the body's field."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return to_json({"type": "error", "error": {"type": kind, "message": error.message}}).encode()


def _event(type: str, **fields: Any) -> str:  # noqa: A002  the wire's own word
    return f"event: {type}\ndata: {to_json({'type': type, **fields})}\n\n"


def _kind(part: Part) -> str:
    if isinstance(part, ReasoningDelta):
        return "thinking"
    return "text" if isinstance(part, ContentDelta) else "tool_use"


def _empty_block(part: Part) -> Object:
    if isinstance(part, ToolCallStart):
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
    if isinstance(part, ReasoningDelta):
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(part: Part) -> Object:
    if isinstance(part, ReasoningDelta):
        return {"type": "thinking_delta", "thinking": part.text}
    if isinstance(part, ContentDelta):
        return {"type": "text_delta", "text": part.text}
    return {
        "type": "input_json_delta",
        "partial_json": "" if isinstance(part, ToolCallStart) else part.fragment,
    }


def _object(arguments: str) -> Object:
    """The arguments of a call; text that is no object, as an answer that was cut has, is kept as one."""
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}


def _stop(finish_reason: str | None, stop_string: str | None) -> Object:
    if stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_string}
    return {"stop_reason": _STOP_REASONS[finish_reason or "stop"], "stop_sequence": None}


def _usage(usage: Usage) -> Object:
    """Here `input_tokens` are those that were not read from the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
