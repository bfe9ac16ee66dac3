"""GET /health, /ready, /metrics and /openapi.json: what operators and their tools ask."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jinn.server.auth import GuardedRoute
from jinn.server.models import Models


async def health(request: Request) -> Response:
    """200 while the process and its engine live."""
    models: Models = request.app.state.models
    models.check_alive()
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 while requests are taken: the only model is loaded, and the server is not shutting down."""
    models: Models = request.app.state.models
    models.admit()
    return JSONResponse({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Counters and clocks in Prometheus' text format."""
    models: Models = request.app.state.models
    return Response(models.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(request: Request) -> Response:
    """This API as an OpenAPI document."""
    return JSONResponse(request.app.openapi())


ROUTES = [
    GuardedRoute("/health", health, methods=["GET"]),
    GuardedRoute("/ready", ready, methods=["GET"]),
    GuardedRoute("/metrics", metrics, methods=["GET"]),
    GuardedRoute("/openapi.json", openapi, methods=["GET"]),
]
