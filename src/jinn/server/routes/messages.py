"""/v1/messages: Anthropic's API."""

from __future__ import annotations

import secrets

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jinn.server import errors
from jinn.server.auth import GuardedRoute
from jinn.server.body import read_json_object
from jinn.server.chat import prepare_chat
from jinn.server.messages_request import own_error, parse_count, parse_messages, to_chat
from jinn.server.messages_wire import MessagesWire, encode_error
from jinn.server.models import Models
from jinn.server.schemas import parse_chat
from jinn.server.stream import GenerationResponse
from jinn.server.turns import prepare_turn


async def create_message(request: Request) -> Response:
    """The assistant's next message."""
    models: Models = request.app.state.models
    models.admit()
    ignored = models.ignored_fields()
    body = parse_messages(await read_json_object(request), ignored)
    try:
        prepared = await prepare_chat(request, parse_chat(to_chat(body), None))
    except errors.APIError as error:
        raise own_error(error) from None
    return GenerationResponse(
        prepared.service,
        prepared.generation,
        MessagesWire(
            f"msg_{secrets.token_hex(12)}",
            prepared.service.name_for(request),
            len(prepared.generation.prompts[0]),
        ),
        is_stream=body.stream,
        ignored=ignored,
    )


async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has."""
    models: Models = request.app.state.models
    models.admit()
    body = parse_count(await read_json_object(request), models.ignored_fields())
    try:
        chat = parse_chat(to_chat(body), None)
        service = await models.acquire(request, chat.model)
        turn = await prepare_turn(service, chat.turn(), service.sampling_defaults)
    except errors.APIError as error:
        raise own_error(error) from None
    return JSONResponse({"input_tokens": len(turn.prompt_ids)})


ROUTES = [
    GuardedRoute("/v1/messages", create_message, methods=["POST"], encode_error=encode_error),
    GuardedRoute("/v1/messages/count_tokens", count_tokens, methods=["POST"], encode_error=encode_error),
]
