"""How the Responses API writes an answer: items, and the events in which they come."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from jinn.engine.messages import SamplingParams
from jinn.server.errors import APIError
from jinn.server.generation import Usage
from jinn.server.responses_request import ResponsesRequest
from jinn.server.stream import FoldedChoice
from jinn.server.wire import to_json
from jinn.text.choice import Delta
from jinn.text.message import AssistantMessage, ContentDelta, Part, ReasoningDelta, ToolCallStart

Object = dict[str, Any]


class ResponsesWire:
    """Writes one response. `on_end` is given the whole of it, and its message, once it has ended."""

    def __init__(
        self,
        response_id: str,
        request: ResponsesRequest,
        model: str,
        sampling: SamplingParams,
        on_end: Callable[[Object, AssistantMessage], None],
    ) -> None:
        self.response = _response(response_id, request, model, sampling)
        self._on_end = on_end
        self._events = _Events()
        self._items: list[_OpenItem] = []
        self._message = AssistantMessage()
        self._finish_reason: str | None = None

    def chunk(self, delta: Delta) -> str:
        events = "" if self._events.has_begun else self._begin()
        for part in delta.parts:
            self._message.add(part)
            events += "".join(self._add(part))
        self._finish_reason = delta.finish_reason or self._finish_reason
        return events

    def last_chunk(self, usage: Usage) -> str:
        events = "".join(self._close_last())
        output = [item.fields() for item in self._items]
        self._end(output, self._finish_reason, usage, self._message)
        return events + self._events.write(f"response.{self.response['status']}", response=self.response)

    def answer(self, choices: list[FoldedChoice], usage: Usage) -> Object:
        (choice,) = choices
        items = _whole_items(choice.message, choice.finish_reason)
        self._end(items, choice.finish_reason, usage, choice.message)
        return self.response

    def error(self, error: APIError) -> str:
        fields = {"code": error.code or "server_error", "message": error.message}
        self.response.update(status="failed", error=fields)
        return self._events.write("error", **fields, param=error.param) + self._events.write(
            "response.failed", response=self.response
        )

    def _begin(self) -> str:
        events = (self._events.write(f"response.{name}", response=self.response) for name in _BEGINNING)
        return "".join(events)

    def _end(
        self, output: list[Object], finish_reason: str | None, usage: Usage, message: AssistantMessage
    ) -> None:
        is_cut = finish_reason == "length"
        self.response.update(
            status="incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            output=output,
            usage=_usage(usage),
        )
        self._on_end(self.response, message)

    def _add(self, part: Part) -> Iterator[str]:
        """The events for a part; one that does not continue the last item ends it and begins the next."""
        kind = _kind(part)
        if isinstance(part, ToolCallStart) or not self._items or self._items[-1].kind != kind:
            yield from self._close_last()
            self._items.append(_OpenItem(kind, part))
            yield from self._open(self._items[-1])
        if not isinstance(part, ToolCallStart):
            text = part.text if isinstance(part, ContentDelta | ReasoningDelta) else part.fragment
            yield self._delta(self._items[-1], text)

    def _open(self, item: _OpenItem) -> Iterator[str]:
        index = len(self._items) - 1
        added = {**item.fields("in_progress"), **({"content": []} if item.kind != "function_call" else {})}
        yield self._events.write("response.output_item.added", output_index=index, item=added)
        if item.kind != "function_call":
            yield self._events.write(
                "response.content_part.added", **self._place(item), content_index=0, part=item.part()
            )

    def _delta(self, item: _OpenItem, text: str) -> str:
        item.text += text
        extra: Object = {"logprobs": []} if item.kind == "message" else {}
        return self._events.write(
            f"response.{item.text_name}.delta", **self._place(item), **item.content_index, delta=text, **extra
        )

    def _close_last(self) -> Iterator[str]:
        if not self._items:
            return
        item = self._items[-1]
        place, name = self._place(item), f"response.{item.text_name}.done"
        if item.kind == "function_call":
            yield self._events.write(name, **place, name=item.name, arguments=item.text)
        else:
            extra: Object = {"logprobs": []} if item.kind == "message" else {}
            yield self._events.write(name, **place, content_index=0, text=item.text, **extra)
            yield self._events.write("response.content_part.done", **place, content_index=0, part=item.part())
        yield self._events.write(
            "response.output_item.done", output_index=place["output_index"], item=item.fields()
        )

    def _place(self, item: _OpenItem) -> Object:
        return {"item_id": item.id, "output_index": len(self._items) - 1}


_BEGINNING = ("created", "in_progress")
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_TEXT_NAMES = {
    "message": "output_text",
    "reasoning": "reasoning_text",
    "function_call": "function_call_arguments",
}


class _Events:
    """Numbers the events."""

    def __init__(self) -> None:
        self._number = 0

    @property
    def has_begun(self) -> bool:
        return self._number > 0

    def write(self, type: str, **fields: Any) -> str:  # noqa: A002  the wire's own word
        event = {"type": type, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {type}\ndata: {to_json(event)}\n\n"


class _OpenItem:
    """An item of the output while its text comes."""

    def __init__(self, kind: str, part: Part) -> None:
        self.kind = kind
        self.id = f"{_PREFIXES[kind]}_{secrets.token_hex(24)}"
        self.text = ""
        self.text_name = _TEXT_NAMES[kind]
        self.content_index = {} if kind == "function_call" else {"content_index": 0}
        self.call_id, self.name = (part.id, part.name) if isinstance(part, ToolCallStart) else ("", "")

    def part(self) -> Object:
        """The item's one content part."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def fields(self, status: str = "completed") -> Object:
        if self.kind == "function_call":
            call = {"call_id": self.call_id, "name": self.name, "arguments": self.text}
            return {"type": "function_call", "id": self.id, **call, "status": status}
        if self.kind == "reasoning":
            own: Object = {"summary": [], "content": [self.part()], "encrypted_content": None}
            return {"type": "reasoning", "id": self.id, **own, "status": status}
        own = {"role": "assistant", "content": [self.part()]}
        return {"type": "message", "id": self.id, **own, "status": status}


def _kind(part: Part) -> str:
    if isinstance(part, ReasoningDelta):
        return "reasoning"
    return "message" if isinstance(part, ContentDelta) else "function_call"


def _whole_items(message: AssistantMessage, finish_reason: str | None) -> list[Object]:
    """The output of a message that is known whole."""
    parts: list[tuple[Part, str]] = []
    if message.reasoning:
        parts.append((ReasoningDelta(""), message.reasoning))
    if message.content:
        parts.append((ContentDelta(""), message.content))
    for index, call in enumerate(message.tool_calls):
        parts.append((ToolCallStart(index, call.id, call.name), call.arguments))
    items = []
    for part, text in parts:
        item = _OpenItem(_kind(part), part)
        item.text = text
        items.append(item.fields())
    if items and finish_reason == "length":
        items[-1]["status"] = "incomplete"
    return items


def _usage(usage: Usage) -> Object:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _response(response_id: str, request: ResponsesRequest, model: str, sampling: SamplingParams) -> Object:
    """A response that has just begun."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata,
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": request.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": request.store,
        "temperature": sampling.temperature,
        "text": {"format": request.text.format.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": request.tool_choice
        if isinstance(request.tool_choice, str)
        else request.tool_choice.model_dump(),
        "tools": [_shown_tool(tool.model_dump()) for tool in request.tools],
        "top_logprobs": 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


def _shown_tool(tool: Object) -> Object:
    return {**tool, "strict": bool(tool["strict"])}
