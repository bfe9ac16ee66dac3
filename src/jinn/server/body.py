"""From the bytes of a body to checked JSON: size, time, encoding, depth, numbers and strings."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from jinn.server import errors
from jinn.server.limits import BODY_SECONDS, MAX_ARRIVING_BYTES, MAX_BODY_BYTES, MAX_JSON_DEPTH


async def read_json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object that holds only finite numbers, whole characters and unique keys.

    Raises APIError 400, 408, 413 or 415, and starlette's ClientDisconnect.
    """
    _check_headers(request)
    bodies: ArrivingBodies = request.app.state.bodies
    try:
        body = await bodies.read(request.stream())
    except TimeoutError:
        raise errors.APIError(
            408,
            f"The body did not arrive within {BODY_SECONDS:g} seconds, or before too many others.",
            code="request_timeout",
            headers={"connection": "close"},
        ) from None
    return parse_json_object(body)


class ArrivingBodies:
    """The bodies that are on their way, the first begun first.

    While all together have more than MAX_ARRIVING_BYTES, the time of the first is up.
    """

    def __init__(self) -> None:
        self._sizes: dict[asyncio.Timeout, int] = {}
        self._num_bytes = 0  # their sum

    async def read(self, stream: AsyncIterator[bytes]) -> bytes:
        """A body. Raises TimeoutError, APIError 413, and starlette's ClientDisconnect."""
        body = bytearray()
        async with asyncio.timeout(BODY_SECONDS) as deadline:
            self._sizes[deadline] = 0
            try:
                async for chunk in stream:
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        raise errors.body_too_large(MAX_BODY_BYTES)
                    self._count(deadline, len(chunk))
            finally:
                self._forget(deadline)
        return bytes(body)

    def _count(self, deadline: asyncio.Timeout, num_bytes: int) -> None:
        if deadline in self._sizes:  # else its time is up
            self._sizes[deadline] += num_bytes
            self._num_bytes += num_bytes
        while self._num_bytes > MAX_ARRIVING_BYTES:
            first = next(iter(self._sizes))
            self._forget(first)
            first.reschedule(asyncio.get_running_loop().time())

    def _forget(self, deadline: asyncio.Timeout) -> None:
        self._num_bytes -= self._sizes.pop(deadline, 0)


def _check_headers(request: Request) -> None:
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise errors.APIError(
            415,
            "The body must be JSON, sent with 'content-type: application/json'.",
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise errors.APIError(415, "A compressed body is not accepted.", code="unsupported_media_type")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
        raise errors.body_too_large(MAX_BODY_BYTES)


def parse_json_object(body: bytes) -> dict[str, Any]:
    """Parse strictly. Raises APIError 400 that names the byte, or the field's path."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise errors.invalid_json(f"The body is not valid UTF-8 at byte {error.start}.") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        position = len(text[: error.pos].encode())
        raise errors.invalid_json(f"The body is not valid JSON at byte {position}: {error.msg}.") from None
    except RecursionError:
        raise errors.invalid_json(_too_deep()) from None
    except ValueError:  # an integer with more digits than Python converts
        raise errors.invalid_json("The body holds a number with too many digits.") from None
    if not isinstance(value, dict):
        raise errors.invalid_json("The body must be a JSON object.")
    _check_values(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise errors.invalid_json(f"The key '{_printable(key)}' appears twice.", _printable(key))
            seen.add(key)
    return result


def _check_values(root: dict[str, Any]) -> None:
    """Refuse NaN, infinities, lone surrogates and deep nesting, in one walk without recursion."""
    pending: list[tuple[str, Any, int]] = [("", root, 1)]
    while pending:
        path, node, depth = pending.pop()
        if depth > MAX_JSON_DEPTH:
            raise errors.invalid_json(_too_deep(), path)
        if isinstance(node, dict) and not all(map(_is_text, node)):
            raise errors.invalid_json("A key holds half a character (a lone surrogate).", path or None)
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            kind = type(value)
            if kind is int:
                continue
            if kind is str and not _is_text(value):
                where = join_path(path, key)
                raise errors.invalid_json(f"'{where}' holds half a character (a lone surrogate).", where)
            if kind is float and not math.isfinite(value):
                where = join_path(path, key)
                raise errors.invalid_json(f"'{where}' must be a finite number.", where)
            if kind is dict or kind is list:
                pending.append((join_path(path, key), value, depth + 1))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(key: str) -> str:
    return key.encode(errors="replace").decode()


def _too_deep() -> str:
    return f"The body is nested deeper than {MAX_JSON_DEPTH} levels."


def join_path(path: str, key: str | int) -> str:
    """`messages` and 0 give `messages[0]`; `messages[0]` and `role` give `messages[0].role`."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key
