"""GET /health, /ready, /metrics and /openapi.json: what operators and their tools ask."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jinn.server import errors
from jinn.server.auth import GuardedRoute
from jinn.server.service import Service


async def health(request: Request) -> Response:
    """200 while the process and its engine live."""
    service: Service = request.app.state.service
    if not service.engine.is_alive:
        raise errors.engine_down()
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 while requests are taken: the model is loaded, and the server is not shutting down."""
    service: Service = request.app.state.service
    service.admit()
    return JSONResponse({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Counters and clocks in Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(request: Request) -> Response:
    """This API as an OpenAPI document."""
    return JSONResponse(request.app.openapi())


ROUTES = [
    GuardedRoute("/health", health, methods=["GET"]),
    GuardedRoute("/ready", ready, methods=["GET"]),
    GuardedRoute("/metrics", metrics, methods=["GET"]),
    GuardedRoute("/openapi.json", openapi, methods=["GET"]),
]
