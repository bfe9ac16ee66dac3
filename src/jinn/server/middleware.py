"""Around every request: its id, one log line, and an answer to whatever went wrong. Plain ASGI."""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jinn.server import errors

if TYPE_CHECKING:
    from jinn.server.tracing import Tracer

logger = logging.getLogger("jinn.server")
access_logger = logging.getLogger("jinn.access")


_PROBES = ("/health", "/ready", "/metrics")  # routes that are asked all the time


class RequestMiddleware:
    """Gives a request its id, and the client an answer even where the app raised."""

    def __init__(self, app: ASGIApp, tracer: Tracer | None = None) -> None:
        self.app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        arrived_at = time.monotonic()
        scope.setdefault("state", {}).update(request_id=request_id, arrived_at=arrived_at)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("request failed", extra={"request_id": request_id})
            if not status:
                await send_error(errors.internal_error(), scope, send_with_id)
        finally:
            if release := scope["state"].get("release"):
                release()  # see Models.acquire
            ended_at = time.monotonic()
            _log_access(scope, status or 499, ended_at - arrived_at)
            if self._tracer is not None and _route(scope) not in (None, *_PROBES):
                self._tracer.record(scope, status or 499, ended_at)


class HostMiddleware:
    """Answers only to known names: a page that lets its own name point here (DNS rebinding) is refused."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "*" not in self._hosts:
            values = [value for name, value in scope["headers"] if name == b"host"]
            if len(values) != 1 or _host_name(values[0].decode("latin-1")) not in self._hosts:
                await send_error(errors.invalid_host(), scope, send)
                return
        await self.app(scope, receive, send)


def _host_name(host: str) -> str:
    """A Host header's name in lower case, without its port."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdecimal() and (":" not in name or name.endswith("]")) else host.lower()


def encode_error(scope: Scope, error: errors.APIError) -> bytes:
    """An error in the form of the API whose route was asked."""
    route = scope.get("route")
    return error.encode() if route is None else bytes(route.encode_error(error))


async def send_error(error: errors.APIError, scope: Scope, send: Send) -> None:
    """The whole answer for an error."""
    body = encode_error(scope, error)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": body})


def _route(scope: Scope) -> str | None:
    """The route's template; None where there is no such route."""
    path: str | None = getattr(scope.get("route"), "path", None)
    return path


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    """One line per request: the route's template, never the raw path, body or a header."""
    route = _route(scope)
    fields: dict[str, Any] = {
        "request_id": scope["state"]["request_id"],
        "key": scope["state"].get("key_name"),
        "method": scope["method"] if route else None,
        "route": route,
        "status": status,
        "ms": round(seconds * 1000, 1),
    }
    usage = scope["state"].get("usage")
    if usage is not None:
        fields["prompt_tokens"] = usage.prompt_tokens
        fields["cached_tokens"] = usage.cached_tokens
        fields["completion_tokens"] = usage.completion_tokens
    level = logging.DEBUG if route in _PROBES else logging.INFO
    access_logger.log(level, "request", extra=fields)
