"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jinn.engine.messages import SamplingParams
from jinn.server import errors
from jinn.server.auth import GuardedRoute
from jinn.server.body import read_json_object
from jinn.server.generation import GenerationRequest, Usage
from jinn.server.models import Models
from jinn.server.schemas import ChatRequest, parse_chat
from jinn.server.service import Service
from jinn.server.stream import FoldedChoice, GenerationResponse
from jinn.server.wire import AnswerHead, TokenBytes, chat_logprobs, to_json, usage_fields
from jinn.text.choice import Delta, TokenEntry


async def create_chat_completion(request: Request) -> Response:
    """The assistant's next message of a conversation."""
    models: Models = request.app.state.models
    models.admit()
    ignored = models.ignored_fields()
    chat = parse_chat(await read_json_object(request), ignored)
    service = await models.acquire(request, chat.model)
    ready = service.admit()
    chat.check_vocabulary(ready.vocab_size)
    prompt_ids = await encode_chat(service, chat)
    sampling = chat.sampling_params(service.sampling_defaults)
    service.check_room((prompt_ids,), sampling, "messages")
    head = AnswerHead.create("chatcmpl", service.card.name, ready.system_fingerprint)
    return GenerationResponse(
        service,
        GenerationRequest.create(request, (prompt_ids,), sampling),
        ChatWire(head, chat, sampling, service.tokenizer.token_bytes),
        is_stream=chat.stream,
        ignored=ignored,
    )


async def encode_chat(service: Service, chat: ChatRequest) -> tuple[int, ...]:
    """The ids of a conversation, ready for the answer. Raises APIError 400 where the template refuses."""
    messages = [message.for_template() for message in chat.messages]
    num_characters = sum(len(message["content"]) for message in messages)
    try:
        return tuple(await service.run_text(num_characters, service.encode_chat, messages))
    except ValueError as error:
        raise errors.invalid_value("messages", f"'messages': {error}") from None


class ChatWire:
    """Writes chat completions and their chunks, which are joined from ready-made parts: there are many."""

    def __init__(
        self, head: AnswerHead, chat: ChatRequest, sampling: SamplingParams, token_bytes: TokenBytes
    ) -> None:
        self._head = head
        self._seed = sampling.seed
        self._token_bytes = token_bytes
        self._has_logprobs = chat.logprobs
        self._include_usage = chat.include_usage
        self._begin = f"data: {to_json(head.fields('chat.completion.chunk'))[:-1]}"
        self._no_usage = ',"usage":null' if chat.include_usage else ""
        self._started: set[int] = set()

    def chunk(self, delta: Delta) -> str:
        events = ""
        if delta.index not in self._started:
            self._started.add(delta.index)
            events = self._event(delta.index, '{"role":"assistant","content":"","refusal":null}')
        if delta.text or delta.entries:
            logprobs = to_json(self._logprobs(delta.entries)) if self._has_logprobs else "null"
            events += self._event(delta.index, f'{{"content":{to_json(delta.text)}}}', logprobs)
        if delta.finish_reason:
            events += self._event(
                delta.index, "{}", finish_reason=f'"{delta.finish_reason}"', seed=f',"seed":{self._seed}'
            )
        return events

    def _event(
        self, index: int, delta: str, logprobs: str = "null", finish_reason: str = "null", seed: str = ""
    ) -> str:
        choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}'
        return f'{self._begin},"choices":[{choice}]{seed}{self._no_usage}}}\n\n'

    def last_chunk(self, usage: Usage) -> str:
        if not self._include_usage:
            return ""
        return f'{self._begin},"choices":[],"usage":{to_json(usage_fields(usage))}}}\n\n'

    def answer(self, choices: list[FoldedChoice], usage: Usage) -> dict[str, Any]:
        return {
            **self._head.fields("chat.completion"),
            "choices": [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.entries),
                    "finish_reason": choice.finish_reason,
                }
                for choice in choices
            ],
            "usage": usage_fields(usage),
            "seed": self._seed,
        }

    def _logprobs(self, entries: list[TokenEntry] | tuple[TokenEntry, ...]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self._token_bytes) if self._has_logprobs else None


ROUTES = [GuardedRoute("/v1/chat/completions", create_chat_completion, methods=["POST"])]
