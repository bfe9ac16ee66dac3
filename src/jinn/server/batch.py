"""A file of requests to a file of answers, in the lines of OpenAI's batch API, through the app itself.

No socket is opened. Answers are written as they come, each line whole, so that a run that was cut goes on
where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from starlette.types import ASGIApp, Message

Progress = Callable[[int, int], None]
"""Takes the requests answered so far, and all."""

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")

_MAX_RETRIES = 100


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the app said to one request."""

    status: int
    headers: dict[str, str]
    body: bytes


def read_requests(path: Path) -> list[BatchRequest]:
    """The lines of an input file. Raises OSError, and ValueError naming the line and the field."""
    requests: dict[str, BatchRequest] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            request = _parse(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if request.custom_id in requests:
            raise ValueError(f"{path}, line {number}: custom_id {request.custom_id!r} is there twice")
        requests[request.custom_id] = request
    return list(requests.values())


def _parse(line: bytes) -> BatchRequest:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("it is no object")
    custom_id, url, body = (fields.get(name) for name in ("custom_id", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("custom_id must be a text")
    if fields.get("method", "POST") != "POST":
        raise ValueError("method must be POST")
    if not isinstance(url, str) or url not in URLS:
        raise ValueError(f"url must be one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise ValueError("body must be an object")
    if body.get("stream"):
        raise ValueError("body.stream must not be true")
    return BatchRequest(custom_id, url, body)


def answered_ids(path: Path) -> set[str]:
    """The custom_ids that an output file already answers; a last line that was cut is taken away.

    Raises ValueError naming the line where the file holds something else.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    ids = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            ids.add(str(json.loads(line)["custom_id"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: it is no answer of a batch") from None
    return ids


async def run_batch(
    app: ASGIApp, requests: list[BatchRequest], output: BinaryIO, concurrency: int, progress: Progress
) -> int:
    """Answer every request, `concurrency` at a time, into `output`. Returns how many were refused."""
    num_done = num_refused = 0
    waiting = iter(requests)

    async def work() -> None:
        nonlocal num_done, num_refused
        for request in waiting:
            answer = await _ask(app, request)
            output.write(_line(request, answer))
            output.flush()
            num_done += 1
            num_refused += answer.status != 200
            progress(num_done, len(requests))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(work())
    return num_refused


async def _ask(app: ASGIApp, request: BatchRequest) -> Answer:
    """The answer to a request; again later where the server is busy or its engine starts."""
    body = json.dumps(request.body).encode()
    for _ in range(_MAX_RETRIES):
        answer = await call(app, request.url, body)
        if answer.status not in (429, 503):
            break
        await asyncio.sleep(float(answer.headers.get("retry-after", "1")))
    return answer


async def call(app: ASGIApp, path: str, body: bytes) -> Answer:
    """POST a body to an app in this process."""
    sent: list[Message] = []
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    is_over = asyncio.Event()

    async def receive() -> Message:
        if pending:
            return pending.pop()
        await is_over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": headers,
    }
    try:
        await app(scope, receive, send)
    finally:
        is_over.set()
    start, *parts = sent
    answer_headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    return Answer(start["status"], answer_headers, b"".join(part.get("body", b"") for part in parts))


def _line(request: BatchRequest, answer: Answer) -> bytes:
    fields = {
        "id": f"batch_req_{secrets.token_hex(12)}",
        "custom_id": request.custom_id,
        "response": {
            "status_code": answer.status,
            "request_id": answer.headers.get("x-request-id"),
            "body": json.loads(answer.body),
        },
        "error": None,
    }
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"
