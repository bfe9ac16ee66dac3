"""POST /v1/completions."""

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
from jinn.server.schemas import CompletionRequest, parse_completion
from jinn.server.service import Service
from jinn.server.stream import FoldedChoice, GenerationResponse
from jinn.server.wire import AnswerHead, ChunkWire, TokenBytes, completion_logprobs, to_json
from jinn.text.choice import Delta, TokenEntry
from jinn.text.infill import encode_infill

_KIND = "text_completion"


async def create_completion(request: Request) -> Response:
    """The continuation of one or several prompts."""
    models: Models = request.app.state.models
    models.admit()
    ignored = models.ignored_fields()
    completion = parse_completion(await read_json_object(request), ignored)
    service = await models.acquire(request, completion.model)
    completion.check_vocabulary(service.admit().vocab_size)
    prompts = tuple([await _encode(service, completion, prompt) for prompt in completion.prompt])
    sampling = completion.sampling_params(service.sampling_defaults)
    service.check_room(prompts, sampling, "prompt")
    grammar = await service.grammar(completion.wanted())
    head = AnswerHead.create("cmpl", service.name_for(request), service.system_fingerprint(request))
    echoes = _echoes(service, completion) if completion.echo else None
    wire = CompletionWire(head, completion, sampling, service.tokenizer.token_bytes)
    return GenerationResponse(
        service,
        GenerationRequest.create(request, prompts, sampling, echoes, grammar=grammar),
        wire,
        is_stream=completion.stream,
        ignored=ignored,
        write_progress=wire.progress if completion.return_progress else None,
    )


async def _encode(
    service: Service, completion: CompletionRequest, prompt: str | list[int]
) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return tuple(prompt)
    if completion.suffix:
        return await _encode_infill(service, prompt, completion.suffix)
    return tuple(
        await service.run_text(
            len(prompt),
            service.tokenizer.encode,
            prompt,
            parse_special=completion.parse_special,
            add_bos=None if completion.add_special_tokens else False,
        )
    )


async def _encode_infill(service: Service, prefix: str, suffix: str) -> tuple[int, ...]:
    num_characters = len(prefix) + len(suffix)
    try:
        return tuple(await service.run_text(num_characters, encode_infill, service.tokenizer, prefix, suffix))
    except ValueError as error:
        raise errors.unsupported_parameter("suffix", f"'suffix': {error}.") from None


def _echoes(service: Service, completion: CompletionRequest) -> tuple[str, ...]:
    return tuple(
        prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)
        for prompt in completion.prompt
    )


class CompletionWire(ChunkWire):
    """Writes completions and their chunks."""

    def __init__(
        self,
        head: AnswerHead,
        completion: CompletionRequest,
        sampling: SamplingParams,
        token_bytes: TokenBytes,
    ) -> None:
        super().__init__(head, _KIND, sampling.seed, include_usage=completion.include_usage)
        self._token_bytes = token_bytes
        self._has_logprobs = completion.logprobs is not None

    def chunk(self, delta: Delta) -> str:
        logprobs = to_json(self._logprobs(delta.entries)) if self._has_logprobs else "null"
        finish_reason = f'"{delta.finish_reason}"' if delta.finish_reason else "null"
        choice = (
            f'{{"index":{delta.index},"text":{to_json(delta.text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish_reason}}}'
        )
        return self._event(choice, is_last=bool(delta.finish_reason))

    def answer(self, choices: list[FoldedChoice], usage: Usage) -> dict[str, Any]:
        written = [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": self._logprobs(choice.entries),
                "finish_reason": choice.finish_reason,
            }
            for choice in choices
        ]
        return self._answer(_KIND, written, usage)

    def _logprobs(self, entries: list[TokenEntry] | tuple[TokenEntry, ...]) -> dict[str, Any] | None:
        return completion_logprobs(entries, self._token_bytes) if self._has_logprobs else None


ROUTES = [GuardedRoute("/v1/completions", create_completion, methods=["POST"])]
