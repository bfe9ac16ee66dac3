"""The OpenAPI document. Bodies are read and written by hand for speed, so their schemas are added here.

Imported only when the document is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

import jinn.server.responses as r
from jinn import __version__
from jinn.server.auth import PUBLIC_ROUTES, GuardedRoute
from jinn.server.messages_request import (
    ACCEPTED_MESSAGES,
    REFUSED_MESSAGES,
    CountTokensRequest,
    MessagesRequest,
)
from jinn.server.parameters import (
    ACCEPTED,
    ACCEPTED_MESSAGE,
    ACCEPTED_READING,
    REFUSED_CHAT,
    REFUSED_COMPLETION,
    REFUSED_MESSAGE,
)
from jinn.server.responses_request import ACCEPTED_RESPONSES, REFUSED_RESPONSES, ResponsesRequest
from jinn.server.routes.embeddings import EmbeddingRequest
from jinn.server.routes.rerank import RerankRequest, ScoreRequest
from jinn.server.routes.tokenize import DetokenizeRequest, TokenizeRequest
from jinn.server.schemas import ChatRequest, CompletionRequest, Message

JSON = "application/json"
EVENTS = "text/event-stream"
ANTHROPIC_PATH = "/v1/messages"  # whose errors have a form of their own
_REF = "#/components/schemas/{model}"

_COLUMNS: dict[type[BaseModel], tuple[dict[str, str], dict[str, tuple[Any, ...]]]] = {
    ChatRequest: (ACCEPTED, REFUSED_CHAT),
    CompletionRequest: (ACCEPTED, REFUSED_COMPLETION),
    Message: (ACCEPTED_MESSAGE, REFUSED_MESSAGE),
    ResponsesRequest: (ACCEPTED_RESPONSES, REFUSED_RESPONSES),
    MessagesRequest: (ACCEPTED_MESSAGES, REFUSED_MESSAGES),
    CountTokensRequest: (ACCEPTED_MESSAGES, REFUSED_MESSAGES),
    EmbeddingRequest: (ACCEPTED_READING, {}),
    RerankRequest: (ACCEPTED_READING, {}),
    ScoreRequest: (ACCEPTED_READING, {}),
    TokenizeRequest: (ACCEPTED_READING, {}),
    DetokenizeRequest: (ACCEPTED_READING, {}),
}

_WITH_BODY = (400, 401, 404, 408, 413, 415, 429, 500, 503)

# Route to request body, answer by media type, and the statuses of its errors.
_OPERATIONS: dict[str, tuple[type[BaseModel] | None, dict[str, type[BaseModel] | None], tuple[int, ...]]] = {
    "/health": (None, {JSON: r.Status}, (400, 503)),
    "/ready": (None, {JSON: r.Status}, (400, 503)),
    "/": (None, {"text/html": None}, (400,)),
    "/page.js": (None, {"text/javascript": None}, (400,)),
    "/page.css": (None, {"text/css": None}, (400,)),
    "/metrics": (None, {"text/plain": None}, (400, 401)),
    "/openapi.json": (None, {JSON: None}, (400, 401)),
    "/v1/models": (None, {JSON: r.ModelList}, (400, 401)),
    "/v1/models/{model:path}": (None, {JSON: r.Model}, (400, 401, 404)),
    "/v1/chat/completions": (
        ChatRequest,
        {JSON: r.ChatCompletion, EVENTS: r.ChatCompletionChunk},
        _WITH_BODY,
    ),
    "/v1/completions": (CompletionRequest, {JSON: r.Completion, EVENTS: r.CompletionChunk}, _WITH_BODY),
    "/v1/responses": (ResponsesRequest, {JSON: None, EVENTS: None}, _WITH_BODY),
    "/v1/responses/{response_id}": (None, {JSON: None}, (400, 401, 404)),
    "/v1/responses/{response_id}/cancel": (None, {JSON: None}, (400, 401, 404)),
    "/v1/responses/{response_id}/input_items": (None, {JSON: None}, (400, 401, 404)),
    "/v1/messages": (MessagesRequest, {JSON: None, EVENTS: None}, _WITH_BODY),
    "/v1/messages/count_tokens": (CountTokensRequest, {JSON: None}, _WITH_BODY),
    "/v1/embeddings": (EmbeddingRequest, {JSON: r.EmbeddingList}, _WITH_BODY),
    "/v1/rerank": (RerankRequest, {JSON: r.Reranking}, _WITH_BODY),
    "/v1/score": (ScoreRequest, {JSON: r.ScoreList}, _WITH_BODY),
    "/tokenize": (TokenizeRequest, {JSON: r.Tokens}, _WITH_BODY),
    "/detokenize": (DetokenizeRequest, {JSON: r.Text}, _WITH_BODY),
    "/tokenizer_info": (None, {JSON: r.TokenizerInfo}, (400, 401, 503)),
}


def describe(routes: Iterable[GuardedRoute]) -> dict[str, Any]:
    """The document for `routes`; one that is missing above raises KeyError."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in sorted({*(route.methods or ())} - {"HEAD"}):
            paths.setdefault(route.path_format, {})[method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "jinn", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: GuardedRoute) -> dict[str, Any]:
    request, answers, error_statuses = _OPERATIONS[route.path]
    operation: dict[str, Any] = {"operationId": route.name, "description": inspect.getdoc(route.endpoint)}
    if route.path not in PUBLIC_ROUTES:
        operation["security"] = [{"key": []}]
    if route.param_convertors:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ]
    if request is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": _reference(request)}}}
    answer_schemas = {
        media_type: {"schema": _answer_schema(media_type, model)} for media_type, model in answers.items()
    }
    error = r.AnthropicErrorResponse if route.path.startswith(ANTHROPIC_PATH) else r.ErrorResponse
    error_schema = {JSON: {"schema": _reference(error)}}
    operation["responses"] = {
        "200": {"description": "OK", "content": answer_schemas},
        **{str(status): {"description": "An error", "content": error_schema} for status in error_statuses},
    }
    return operation


def _answer_schema(media_type: str, model: type[BaseModel] | None) -> dict[str, Any]:
    """Of a stream it describes one event, as OpenAPI 3.2 does: a chunk, an error, or the end."""
    if model is None:
        return {}
    if media_type != EVENTS:
        return dict(_reference(model))
    content = {"anyOf": [_reference(model), _reference(r.ErrorResponse)]}
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": content}
    either = {"anyOf": [data, {"const": "[DONE]"}]}
    return {"type": "object", "required": ["data"], "properties": {"data": either}}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _schemas() -> dict[str, Any]:
    models: list[tuple[type[BaseModel], JsonSchemaMode]] = [(model, "validation") for model in _COLUMNS]
    answers: list[type[BaseModel]] = [r.ErrorResponse, r.AnthropicErrorResponse]
    for _, by_media_type, _ in _OPERATIONS.values():
        answers += [model for model in by_media_type.values() if model is not None]
    models += [(model, "serialization") for model in dict.fromkeys(answers)]
    _, definitions = models_json_schema(models, ref_template=_REF)
    schemas: dict[str, Any] = definitions["$defs"]
    for model, (accepted, refused) in _COLUMNS.items():
        _add_columns(schemas[model.__name__], accepted, refused)
    return schemas


def _add_columns(
    schema: dict[str, Any], accepted: dict[str, str], refused: dict[str, tuple[Any, ...]]
) -> None:
    """Show the parameters that are only accepted, and the few values that refused ones may have."""
    properties = schema["properties"]
    for name, reason in accepted.items():
        properties[name] = {"description": f"Accepted, and changes nothing: {reason}."}
    for name, harmless in refused.items():
        properties[name] = {"description": "Not supported.", "enum": [None, *harmless]}
