"""How an answer leaves: as server-sent events, or whole, as the fold of the same deltas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jinn.server import errors
from jinn.server.generation import (
    ClientGoneError,
    Generation,
    GenerationRequest,
    PromptProgress,
    Usage,
    cancel_when_gone,
)
from jinn.server.service import Service
from jinn.server.wire import to_json
from jinn.text.choice import Delta, TokenEntry
from jinn.text.message import AssistantMessage

PING = b": ping\n\n"

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx would hold the events back
}


@dataclass(slots=True)
class FoldedChoice:
    """All deltas of one choice as one."""

    index: int
    text: str = ""
    message: AssistantMessage = field(default_factory=AssistantMessage)  # where it is read as one
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None  # that ended it

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        for part in delta.parts:
            self.message.add(part)
        self.entries.extend(delta.entries)
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.stop_string = delta.stop_string or self.stop_string


class Wire(Protocol):
    """One API's way to write an answer."""

    def chunk(self, delta: Delta) -> str:
        """The events for a delta."""
        ...

    def last_chunk(self, usage: Usage) -> str:
        """The events after every choice has finished."""
        ...

    def error(self, error: errors.APIError) -> str:
        """The events that end a stream which has begun and cannot go on."""
        ...

    def answer(self, choices: list[FoldedChoice], usage: Usage) -> dict[str, Any]:
        """The body of the whole answer."""
        ...


class GenerationResponse(Response):
    """Runs a request while its client is there, and writes the answer with `wire`.

    The status line waits for the first delta, so that a request that fails before it gets a true status.
    """

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        wire: Wire,
        *,
        is_stream: bool,
        ignored: list[str] | None = None,
        write_progress: Callable[[PromptProgress], str] | None = None,
    ) -> None:
        """`write_progress` makes the events for how far a prompt was read; without it there are none."""
        super().__init__()
        self._service = service
        self._request = request
        self._wire = wire
        self._is_stream = is_stream
        self._write_progress = write_progress
        self._extra_headers = {"x-jinn-ignored": _header_list(ignored)} if ignored else {}
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._service.generate(self._request)
        generation.tells_progress = self._write_progress is not None
        watcher = asyncio.create_task(cancel_when_gone(generation, receive))
        send_answer = self._send_events if self._is_stream else self._send_whole
        try:
            await send_answer(generation, send)
        except errors.APIError as error:
            if not self._is_started:
                raise  # the app knows how this route's errors look
            events = self._wire.error(error).encode()
            await send({"type": "http.response.body", "body": events, "more_body": False})
        except ClientGoneError:
            pass
        finally:
            watcher.cancel()
            self._service.release(generation)
            scope["state"].update(usage=generation.usage, phases=generation.phases)

    async def _send_events(self, generation: Generation, send: Send) -> None:
        chunk = self._wire.chunk
        async for deltas in generation.deltas():
            events = "".join(map(chunk, deltas))
            if self._write_progress is not None:
                events = "".join(map(self._write_progress, generation.take_progress())) + events
            if events or not deltas:  # some deltas say nothing in this API
                await self._send_part(events.encode() or PING, send)
        last = self._wire.last_chunk(generation.usage).encode()
        await self._send_part(last, send, more_body=False)

    async def _send_whole(self, generation: Generation, send: Send) -> None:
        choices: dict[int, FoldedChoice] = {}
        async for deltas in generation.deltas():
            for delta in deltas:
                choices.setdefault(delta.index, FoldedChoice(delta.index)).add(delta)
        in_order = [choices[index] for index in sorted(choices)]
        body = to_json(self._wire.answer(in_order, generation.usage)).encode()
        await self._start(send, {"content-type": "application/json", "content-length": str(len(body))})
        await send({"type": "http.response.body", "body": body})

    async def _send_part(self, body: bytes, send: Send, *, more_body: bool = True) -> None:
        if not self._is_started:
            await self._start(send, _STREAM_HEADERS)
        await send({"type": "http.response.body", "body": body, "more_body": more_body})

    async def _start(self, send: Send, headers: Mapping[str, str]) -> None:
        self._is_started = True
        raw_headers = [
            (name.encode(), value.encode()) for name, value in {**headers, **self._extra_headers}.items()
        ]
        await send({"type": "http.response.start", "status": 200, "headers": raw_headers})


def _header_list(names: list[str]) -> str:
    return ", ".join(name.encode("ascii", "backslashreplace").decode() for name in names)[:1024]
