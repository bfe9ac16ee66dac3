"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jinn.engine.messages import SamplingParams
from jinn.server.auth import GuardedRoute
from jinn.server.body import read_json_object
from jinn.server.chat import prepare_chat
from jinn.server.generation import Usage
from jinn.server.models import Models
from jinn.server.schemas import ChatRequest, parse_chat
from jinn.server.stream import FoldedChoice, GenerationResponse
from jinn.server.wire import AnswerHead, ChunkWire, TokenBytes, chat_logprobs, to_json, tool_call_fields
from jinn.text.choice import Delta, TokenEntry
from jinn.text.message import AssistantMessage, ContentDelta, Part, ReasoningDelta, ToolCallStart


async def create_chat_completion(request: Request) -> Response:
    """The assistant's next message of a conversation."""
    models: Models = request.app.state.models
    models.admit()
    ignored = models.ignored_fields()
    chat = parse_chat(await read_json_object(request), ignored)
    prepared = await prepare_chat(request, chat)
    service = prepared.service
    head = AnswerHead.create("chatcmpl", service.name_for(request), service.system_fingerprint(request))
    fields = service.config.reasoning_fields
    wire = ChatWire(head, chat, prepared.sampling, service.tokenizer.token_bytes, fields)
    return GenerationResponse(
        service,
        prepared.generation,
        wire,
        is_stream=chat.stream,
        ignored=ignored,
        write_progress=wire.progress if chat.return_progress else None,
    )


class ChatWire(ChunkWire):
    """Writes chat completions and their chunks."""

    def __init__(
        self,
        head: AnswerHead,
        chat: ChatRequest,
        sampling: SamplingParams,
        token_bytes: TokenBytes,
        reasoning_fields: Sequence[str],
    ) -> None:
        super().__init__(head, "chat.completion.chunk", sampling.seed, include_usage=chat.include_usage)
        self._token_bytes = token_bytes
        self._reasoning_fields = reasoning_fields
        self._has_logprobs = chat.logprobs
        self._started: set[int] = set()

    def chunk(self, delta: Delta) -> str:
        events = ""
        if delta.index not in self._started:
            self._started.add(delta.index)
            events = self._chunk(delta.index, '{"role":"assistant","content":"","refusal":null}')
        logprobs = to_json(self._logprobs(delta.entries)) if self._has_logprobs else "null"
        for part in delta.parts:
            events += self._chunk(delta.index, self._part(part), logprobs)
            logprobs = "null"  # of all of the delta's tokens, once
        if logprobs != "null" and delta.entries:
            events += self._chunk(delta.index, "{}", logprobs)
        if delta.finish_reason:
            events += self._chunk(delta.index, "{}", finish_reason=f'"{delta.finish_reason}"')
        return events

    def _part(self, part: Part) -> str:
        """A chunk's `delta`. Clients append what is repeated, so a call's id, type and name come once."""
        if isinstance(part, ContentDelta):
            return f'{{"content":{to_json(part.text)}}}'
        if isinstance(part, ReasoningDelta):
            return to_json(dict.fromkeys(self._reasoning_fields, part.text))
        call: dict[str, Any] = {"index": part.index, "function": {"arguments": ""}}
        if isinstance(part, ToolCallStart):
            call |= {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
        else:
            call["function"]["arguments"] = part.fragment
        return to_json({"tool_calls": [call]})

    def _chunk(self, index: int, delta: str, logprobs: str = "null", finish_reason: str = "null") -> str:
        choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}'
        return self._event(choice, is_last=finish_reason != "null")

    def answer(self, choices: list[FoldedChoice], usage: Usage) -> dict[str, Any]:
        written = [
            {
                "index": choice.index,
                "message": self._message(choice.message),
                "logprobs": self._logprobs(choice.entries),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self._answer("chat.completion", written, usage)

    def _message(self, message: AssistantMessage) -> dict[str, Any]:
        """Content is null where there is none but thoughts or calls."""
        content = message.content or (None if message.tool_calls or message.reasoning else "")
        fields: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if message.reasoning:
            fields |= dict.fromkeys(self._reasoning_fields, message.reasoning)
        if message.tool_calls:
            fields["tool_calls"] = [
                tool_call_fields(call.id, call.name, call.arguments) for call in message.tool_calls
            ]
        return fields

    def _logprobs(self, entries: list[TokenEntry] | tuple[TokenEntry, ...]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self._token_bytes) if self._has_logprobs else None


ROUTES = [GuardedRoute("/v1/chat/completions", create_chat_completion, methods=["POST"])]
