"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jinn.server.auth import GuardedRoute
from jinn.server.models import Models, ServedModel


async def list_models(request: Request) -> Response:
    """The models served, each followed by its adapters."""
    models: Models = request.app.state.models
    data = [_fields(model, name) for model in models.models for name in (None, *model.card.adapters)]
    return JSONResponse({"object": "list", "data": data})


async def retrieve_model(request: Request) -> Response:
    """One model, by any name that a request may use."""
    models: Models = request.app.state.models
    return JSONResponse(_fields(*models.find(request.path_params["model"])))


def _fields(model: ServedModel, adapter: str | None) -> dict[str, Any]:
    card = model.card
    fields = {"id": adapter or card.name, "object": "model", "created": card.created, "owned_by": "jinn"}
    if adapter is not None:
        fields["parent"] = card.name
    if model.service is not None and model.service.ready is not None:
        fields["max_model_len"] = model.service.ready.max_model_len
    return fields


ROUTES = [
    GuardedRoute("/v1/models", list_models, methods=["GET"]),
    GuardedRoute("/v1/models/{model:path}", retrieve_model, methods=["GET"]),
]
