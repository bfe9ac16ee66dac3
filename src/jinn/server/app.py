"""The application: routes, their guard, and one form for every error."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jinn.server import errors
from jinn.server.auth import Keyring, authenticate
from jinn.server.middleware import RequestMiddleware
from jinn.server.routes import chat, completions, health, models
from jinn.server.service import Service


class App(FastAPI):
    """FastAPI, with the OpenAPI document made only when asked for."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            from jinn.server.openapi import describe

            self.openapi_schema = describe(self)
        return self.openapi_schema


def create_app(service: Service) -> App:
    """The API in front of `service`. Every route, also a later one, needs a key unless listed in auth.py."""
    app = App(
        title="jinn",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the redirect would be built from the Host header
        dependencies=[Depends(authenticate)],
        exception_handlers={
            errors.APIError: _api_error,
            HTTPException: _http_exception,
            RequestValidationError: _validation_error,
        },
    )
    app.add_middleware(RequestMiddleware)
    app.state.service = service
    app.state.keyring = Keyring([service.config.api_key] if service.config.api_key else [])
    for module in (health, models, chat, completions):
        app.include_router(module.router)
    return app


def _response(error: errors.APIError) -> Response:
    return Response(error.encode(), error.status, error.headers, "application/json")


async def _api_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, errors.APIError):
        raise error
    return _response(error)


async def _http_exception(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return _response(errors.from_status(error.status_code, error.headers))


async def _validation_error(_: Request, __: Exception) -> Response:
    return _response(errors.from_status(400))
