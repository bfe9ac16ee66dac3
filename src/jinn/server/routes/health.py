"""GET /health, /ready, /metrics and /openapi.json: what operators and their tools ask."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jinn.server import errors
from jinn.server.service import Service

router = APIRouter()


@router.get("/health", operation_id="health")
async def health(request: Request) -> Response:
    """200 while the process and its engine live."""
    service: Service = request.app.state.service
    if not service.engine.is_alive:
        raise errors.engine_down()
    return JSONResponse({"status": "ok"})


@router.get("/ready", operation_id="ready")
async def ready(request: Request) -> Response:
    """200 while requests are taken: the model is loaded, and the server is not shutting down."""
    service: Service = request.app.state.service
    service.admit()
    return JSONResponse({"status": "ready"})


@router.get("/metrics", operation_id="metrics")
async def metrics(request: Request) -> Response:
    """Counters and clocks in Prometheus' text format."""
    service: Service = request.app.state.service
    return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/openapi.json", operation_id="openapi")
async def openapi(request: Request) -> Response:
    """This API as an OpenAPI document."""
    return JSONResponse(request.app.openapi())
