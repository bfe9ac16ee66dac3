"""Who asks. Every route needs a key unless it is listed as public; a tenant is what a key stands for."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jinn.server import errors

PUBLIC_ROUTES = frozenset({"/health", "/ready"})

ANONYMOUS = "anonymous"  # the one tenant of a server without keys


class Keyring:
    """The accepted API keys. Only their digests are kept."""

    def __init__(self, api_keys: Iterable[str]) -> None:
        secret = secrets.token_bytes(32)
        self._tenants = [
            (_digest(key.encode()), hmac.new(secret, key.encode(), hashlib.sha256).hexdigest()[:32])
            for key in api_keys
        ]

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an Authorization header. Raises APIError 401."""
        if not self._tenants:
            return ANONYMOUS
        if not authorization:
            raise errors.invalid_api_key("An API key is needed, sent as 'authorization: Bearer KEY'.")
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip().encode())
        # Every key is compared, so that the time taken does not tell which one came close.
        tenants = [tenant for known, tenant in self._tenants if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not tenants:
            raise errors.invalid_api_key("The API key is not valid.")
        return tenants[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class GuardedRoute(Route):
    """A route that needs a key unless its own path is public; the request's URL and Host decide nothing."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self
        if self.path not in PUBLIC_ROUTES:
            keyring: Keyring = scope["app"].state.keyring
            scope["state"]["tenant"] = keyring.tenant(Headers(scope=scope).get("authorization"))
        await super().handle(scope, receive, send)
