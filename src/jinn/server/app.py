"""The application: its routes, and one form for every error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from jinn.server import errors
from jinn.server.auth import PUBLIC_ROUTES, GuardedRoute
from jinn.server.body import ArrivingBodies
from jinn.server.config import ServerConfig
from jinn.server.keys import KeyFile, Keyring
from jinn.server.middleware import HostMiddleware, RequestMiddleware, encode_error
from jinn.server.models import Models
from jinn.server.response_store import ResponseStore
from jinn.server.routes import (
    chat,
    completions,
    embeddings,
    health,
    messages,
    model_list,
    page,
    rerank,
    responses,
    tokenize,
)

if TYPE_CHECKING:
    from jinn.server.tracing import Tracer

_APIS = (health, model_list, chat, completions, responses, messages, embeddings, rerank, tokenize, page)
ROUTES: list[GuardedRoute] = [route for api in _APIS for route in api.ROUTES]


class App(Starlette):
    """The API in front of `models`; its OpenAPI document is made only when asked for."""

    def __init__(self, models: Models, tracer: Tracer | None = None) -> None:
        super().__init__(
            routes=ROUTES,
            middleware=_middleware(models.config, tracer),
            exception_handlers={errors.APIError: _api_error, HTTPException: _http_exception},
        )
        self.router.redirect_slashes = False  # the redirect would be built from the Host header
        self.state.models = models
        config = models.config
        key_file = None if config.api_keys is None else KeyFile(config.api_keys)
        self.state.keyring = Keyring(config.api_key, key_file)
        self.state.public_routes = PUBLIC_ROUTES | ({"/metrics"} if config.public_metrics else set())
        self.state.responses = ResponseStore()
        self.state.bodies = ArrivingBodies()
        self._document: dict[str, Any] | None = None

    def openapi(self) -> dict[str, Any]:
        if self._document is None:
            from jinn.server.openapi import describe

            self._document = describe(ROUTES)
        return self._document


def _middleware(config: ServerConfig, tracer: Tracer | None) -> list[Middleware]:
    """The outermost first."""
    layers = [
        Middleware(RequestMiddleware, tracer=tracer),
        Middleware(HostMiddleware, hosts=config.hosts),
    ]
    if config.allowed_origins:
        from starlette.middleware.cors import CORSMiddleware

        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.allowed_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["authorization", "content-type", "x-api-key", "anthropic-version"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    return layers


def _response(request: Request, error: errors.APIError) -> Response:
    body = encode_error(request.scope, error)
    return Response(body, error.status, error.headers, "application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, errors.APIError):
        raise error
    return _response(request, error)


async def _http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return _response(request, errors.from_status(error.status_code, error.headers))
