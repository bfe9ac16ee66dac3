"""/v1/responses: OpenAI's API of items, which may be continued, retrieved, deleted and cancelled."""

from __future__ import annotations

import secrets
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jinn.server import errors
from jinn.server.auth import GuardedRoute
from jinn.server.body import read_json_object
from jinn.server.chat import prepare_chat
from jinn.server.models import Models
from jinn.server.response_store import ResponseStore, StoredResponse
from jinn.server.responses_request import (
    ChatMessage,
    ResponsesRequest,
    input_items,
    own_error,
    parse_responses,
    to_chat,
)
from jinn.server.responses_wire import ResponsesWire
from jinn.server.schemas import parse_chat
from jinn.server.stream import GenerationResponse
from jinn.server.wire import tool_call_fields
from jinn.text.message import AssistantMessage


async def create_response(request: Request) -> Response:
    """The items that follow the input."""
    models: Models = request.app.state.models
    models.admit()
    ignored = models.ignored_fields()
    body = parse_responses(await read_json_object(request), ignored)
    chat_body = to_chat(body, _history(request, body))
    try:
        prepared = await prepare_chat(request, parse_chat(chat_body, None))
    except errors.APIError as error:
        raise own_error(error) from None
    store: ResponseStore = request.app.state.responses
    on_end = partial(_keep, store, request.state.tenant, body, chat_body["messages"]) if body.store else _drop
    response_id = f"resp_{secrets.token_hex(24)}"
    return GenerationResponse(
        prepared.service,
        prepared.generation,
        ResponsesWire(response_id, body, prepared.service.name_for(request), prepared.sampling, on_end),
        is_stream=body.stream,
        ignored=ignored,
    )


async def retrieve_response(request: Request) -> Response:
    """A response that was stored."""
    return JSONResponse(_find(request, request.path_params["response_id"]).response)


async def delete_response(request: Request) -> Response:
    """Forget a response."""
    stored = _find(request, request.path_params["response_id"])
    store: ResponseStore = request.app.state.responses
    store.delete(request.state.tenant, stored.response["id"])
    return JSONResponse({"id": stored.response["id"], "object": "response", "deleted": True})


async def cancel_response(request: Request) -> Response:
    """Always refused: only responses in the background can be cancelled; others end with their connection."""
    _find(request, request.path_params["response_id"])
    raise errors.invalid_value("response_id", "'response_id' is no response in the background.")


async def list_input_items(request: Request) -> Response:
    """The input of a response."""
    stored = _find(request, request.path_params["response_id"])
    items = [{"id": f"item_{index}", **item} for index, item in enumerate(stored.input_items)]
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]}
    return JSONResponse({"object": "list", "data": items, **ends, "has_more": False})


def _find(request: Request, response_id: str) -> StoredResponse:
    """Raises APIError 404 for a response that is not, or no longer, stored for this key."""
    store: ResponseStore = request.app.state.responses
    stored = store.get(request.state.tenant, response_id)
    if stored is None:
        raise errors.APIError(
            404,
            f"The response '{response_id}' is not stored.",
            param="response_id",
            code="response_not_found",
        )
    return stored


def _history(request: Request, body: ResponsesRequest) -> list[ChatMessage]:
    """The conversation up to the end of the previous response."""
    if body.previous_response_id is None:
        return []
    try:
        return _find(request, body.previous_response_id).messages
    except errors.APIError as error:
        raise errors.renamed(error, {"response_id": "previous_response_id"}) from None


def _keep(
    store: ResponseStore,
    tenant: str,
    body: ResponsesRequest,
    messages: list[ChatMessage],
    response: dict[str, Any],
    message: AssistantMessage,
) -> None:
    """Store a response with the conversation that it ends; instructions hold for one response alone."""
    said = messages if body.instructions is None else messages[1:]
    store.add(tenant, StoredResponse.create(response, input_items(body), [*said, _chat_message(message)]))


def _drop(response: dict[str, Any], message: AssistantMessage) -> None:
    """A response that is not to be stored."""


def _chat_message(message: AssistantMessage) -> ChatMessage:
    fields: ChatMessage = {"role": "assistant", "content": message.content}
    if message.reasoning:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        fields["tool_calls"] = [
            tool_call_fields(call.id, call.name, call.arguments) for call in message.tool_calls
        ]
    return fields


_ONE = "/v1/responses/{response_id}"
ROUTES = [
    GuardedRoute("/v1/responses", create_response, methods=["POST"]),
    GuardedRoute(_ONE, retrieve_response, methods=["GET"]),
    GuardedRoute(_ONE, delete_response, methods=["DELETE"]),
    GuardedRoute(f"{_ONE}/cancel", cancel_response, methods=["POST"]),
    GuardedRoute(f"{_ONE}/input_items", list_input_items, methods=["GET"]),
]
