"""From a chat request to one for the engine: what every API for conversations does alike."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.requests import Request

from jinn.engine.messages import SamplingParams
from jinn.server import errors
from jinn.server.generation import GenerationRequest
from jinn.server.models import Models
from jinn.server.schemas import ChatRequest
from jinn.server.service import Service
from jinn.server.structured import Wanted
from jinn.server.turns import prepare_turn


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A conversation that is ready to be continued."""

    service: Service
    generation: GenerationRequest

    @property
    def sampling(self) -> SamplingParams:
        return self.generation.sampling


async def prepare_chat(request: Request, chat: ChatRequest) -> PreparedChat:
    """Find the model, render the conversation, compile what the answer must be.

    Raises APIError, naming the field of the chat completions API.
    """
    models: Models = request.app.state.models
    service = await models.acquire(request, chat.model)
    chat.check_vocabulary(service.admit().vocab_size)
    turn = await prepare_turn(service, chat.turn(), chat.sampling_params(service.sampling_defaults))
    service.check_room((turn.prompt_ids,), turn.sampling, "messages")
    grammar = await service.grammar(await _wanted(service, chat), turn.thinking_ids)
    generation = GenerationRequest.create(
        request, (turn.prompt_ids,), turn.sampling, make_parser=turn.make_parser, grammar=grammar
    )
    return PreparedChat(service, generation)


async def _wanted(service: Service, chat: ChatRequest) -> Wanted | None:
    """What the answer must be, of calls and of content. Raises APIError 400, 503."""
    wanted, tool_format = chat.wanted(), service.chat_format.tools
    may_call = tool_format is not None and chat.tools and chat.tool_choice != "none"
    if tool_format is None or not may_call or not (chat.is_strict or wanted):
        return wanted
    if wanted is not None and chat.must_call:
        raise errors.invalid_value(
            wanted.param, f"'{wanted.param}' is not allowed where 'tool_choice' asks for a call."
        )
    if wanted is None and not chat.must_call and chat.stop:
        raise errors.unsupported_parameter("stop", "'stop' is not supported together with strict tools.")
    content = None if chat.must_call else "" if wanted is None else await service.compile(wanted)
    tokenizer = service.tokenizer
    control_texts = [
        text
        for text in tool_format.control_texts
        if text in tokenizer.added_tokens and tokenizer.added_tokens[text].id in tokenizer.special_ids
    ]
    return chat.wanted_calls(tool_format.name, control_texts, content)
