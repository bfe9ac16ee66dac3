"""Every route needs a key unless it is listed as public; the request's URL and Host decide nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jinn.server.errors import APIError
from jinn.server.keys import Keyring

PUBLIC_ROUTES = frozenset({"/health", "/ready", "/", "/page.js", "/page.css"})


class GuardedRoute(Route):
    """A route that needs a key unless its own path is public, with its API's form of errors."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        *,
        methods: list[str],
        encode_error: Callable[[APIError], bytes] = APIError.encode,
    ) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.encode_error = encode_error

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self
        if self.path not in scope["app"].state.public_routes:
            keyring: Keyring = scope["app"].state.keyring
            holder = keyring.holder(_key(Headers(scope=scope)))
            scope["state"].update(tenant=holder.tenant, key_name=holder.name)
        await super().handle(scope, receive, send)


def _key(headers: Headers) -> str | None:
    """What stands behind `Bearer`; or in `x-api-key`, as Anthropic's clients send it."""
    authorization = headers.get("authorization")
    if authorization is None:
        return headers.get("x-api-key")
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None
