"""GET /: a page to talk to the model. It needs no key itself; what it asks for does."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

from jinn.server.auth import GuardedRoute

_FILES = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
_MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


async def page(request: Request) -> Response:
    """A page to talk to the model, and its parts."""
    name = _FILES[request.scope["route"].path]
    content = resources.files("jinn.server").joinpath("page", name).read_bytes()
    return Response(content, headers={**_HEADERS, "content-type": _MEDIA_TYPES[name]})


ROUTES = [GuardedRoute(path, page, methods=["GET"]) for path in _FILES]
