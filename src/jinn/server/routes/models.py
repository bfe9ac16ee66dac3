"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jinn.server.auth import GuardedRoute
from jinn.server.service import Service


async def list_models(request: Request) -> Response:
    """The models served."""
    return JSONResponse({"object": "list", "data": [_fields(request.app.state.service)]})


async def retrieve_model(request: Request) -> Response:
    """One model, by any name that a request may use."""
    service: Service = request.app.state.service
    service.card.check_name(request.path_params["model"])
    return JSONResponse(_fields(service))


def _fields(service: Service) -> dict[str, Any]:
    card = service.card
    fields = {"id": card.name, "object": "model", "created": card.created, "owned_by": "jinn"}
    if service.ready is not None:
        fields["max_model_len"] = service.ready.max_model_len
    return fields


ROUTES = [
    GuardedRoute("/v1/models", list_models, methods=["GET"]),
    GuardedRoute("/v1/models/{model:path}", retrieve_model, methods=["GET"]),
]
