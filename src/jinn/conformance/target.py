"""The server under test: requests, and the events of a stream, as they came."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_SECONDS = 120.0


class Failure(Exception):  # noqa: N818  (the server's, not ours)
    """What a server did otherwise than it should."""


class Skip(Exception):  # noqa: N818  (no error)
    """Why a check says nothing of this server."""


def expect(condition: Any, message: str) -> None:
    """Raise Failure unless the condition holds."""
    if not condition:
        raise Failure(message)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        """Raises Failure where the body is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            raise Failure(f"the body is not JSON: {self.body[:80]!r}") from None

    def ok(self) -> Any:
        """The body of a 200. Raises Failure for any other status."""
        expect(self.status == 200, f"status {self.status}: {self.body[:200]!r}")
        return self.json()


class Target:
    """A server at `base_url`, which ends in its `/v1`."""

    def __init__(self, base_url: str, api_key: str | None, model: str | None = None) -> None:
        """Raises ValueError for a URL that is none."""
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url must be like http://127.0.0.1:8000/v1, not {base_url}")
        self.base_url = base_url
        self._parts = parts
        self.api_key = api_key
        self.model = model or ""

    def get(self, path: str, **headers: str) -> Reply:
        return self._request("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """POST a body: bytes as they are, all else as JSON."""
        return self._request("POST", path, body, headers)

    def chat(self, text: str = "Say hello.", **fields: Any) -> Reply:
        return self.post("/chat/completions", self.chat_body(text, **fields))

    def chat_body(self, text: str = "Say hello.", **fields: Any) -> dict[str, Any]:
        """A greedy request for a short answer."""
        messages = [{"role": "user", "content": text}]
        return {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 16, **fields}

    def events(self, path: str, body: dict[str, Any]) -> list[str]:
        """The events of a stream, each without the blank line behind it. Raises Failure for a bad status."""
        with self.stream(path, body) as response:
            text = response.read().decode("utf-8")
        expect(text.endswith("\n\n"), "the stream does not end with a blank line")
        return text.replace("\r\n", "\n").split("\n\n")[:-1]

    def chunks(self, **fields: Any) -> list[Any]:
        """The parsed chunks of a chat stream, without `[DONE]`."""
        events = self.events("/chat/completions", self.chat_body(stream=True, **fields))
        data = [event.removeprefix("data:").strip() for event in events if event.startswith("data:")]
        return [json.loads(text) for text in data if text != "[DONE]"]

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """A stream that has begun; leaving it closes the connection."""
        connection = self._connect()
        try:
            connection.request("POST", self._parts.path + path, json.dumps(body), self._headers({}))
            response = connection.getresponse()
            if response.status != 200:
                raise Failure(f"status {response.status}: {response.read(200)!r}")
            kind = response.headers.get("content-type", "")
            expect(kind.startswith("text/event-stream"), f"the stream has content-type {kind!r}")
            yield response
        finally:
            connection.close()

    def _request(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        connection = self._connect()
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._parts.path + path, content, self._headers(headers))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, names, response.read())
        except (http.client.HTTPException, ConnectionError) as error:
            raise Failure(f"the connection was dropped: {type(error).__name__}") from None
        finally:
            connection.close()

    def _headers(self, more: dict[str, str]) -> dict[str, str]:
        headers = {"content-type": "application/json"}
        if self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key}"
        return {**headers, **{name.replace("_", "-"): value for name, value in more.items()}}

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=context)
        return http.client.HTTPConnection(host, port, timeout=_SECONDS)
