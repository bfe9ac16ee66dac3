"""HTTP/1.1 as uvicorn speaks it, with limits for heads that do not end and answers that nobody reads."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jinn.server import errors
from jinn.server.limits import HEAD_SECONDS, MAX_UNREAD_BYTES, UNCOUNTED_BYTES

logger = logging.getLogger("jinn.server")

_CHECK_SECONDS = 0.1


class UnreadAnswers:
    """The connections whose clients are behind, the one that has been so longest first.

    Nobody waits until a client has read: what was computed for it is kept as bytes. While all connections
    together keep more than MAX_UNREAD_BYTES, the first is dropped, but never the only one.
    """

    def __init__(self) -> None:
        self._transports: dict[asyncio.Transport, None] = {}
        self._check: asyncio.TimerHandle | None = None

    def add(self, transport: asyncio.Transport) -> None:
        self._transports[transport] = None
        if self._check is None:
            self._check = asyncio.get_running_loop().call_later(_CHECK_SECONDS, self._drop_slowest)

    def remove(self, transport: asyncio.Transport) -> None:
        self._transports.pop(transport, None)

    def _drop_slowest(self) -> None:
        sizes = {transport: transport.get_write_buffer_size() for transport in self._transports}
        num_bytes = sum(sizes.values())
        num_dropped = 0
        while num_bytes > MAX_UNREAD_BYTES and len(self._transports) > 1:
            slowest = next(iter(self._transports))
            self.remove(slowest)
            slowest.abort()
            num_bytes -= sizes[slowest]
            num_dropped += 1
        if num_dropped:
            logger.warning("dropped %d clients that did not read their answers", num_dropped)
        self._check = None
        if self._transports:
            self._check = asyncio.get_running_loop().call_later(_CHECK_SECONDS, self._drop_slowest)


class Protocol(H11Protocol):
    """A connection. Outside a request it must begin and end a head in HEAD_SECONDS."""

    _head_timer: asyncio.TimerHandle | None = None

    def __init__(self, unread: UnreadAnswers, **settings: Any) -> None:
        super().__init__(**settings)
        self._unread = unread

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNCOUNTED_BYTES)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_in_request = self.cycle is not None and not self.cycle.response_complete
        if is_in_request:
            self._stop_waiting()
        elif self._head_timer is None:
            self._wait_for_head()

    def pause_writing(self) -> None:
        """The client is behind; whoever writes to it goes on."""
        self._unread.add(self.transport)

    def resume_writing(self) -> None:
        self._unread.remove(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unread.remove(self.transport)
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """The one answer that is given before there is a request."""
        error = errors.APIError(400, msg, code="invalid_http")
        body = error.encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = h11.Response(status_code=error.status, headers=headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait_for_head(self) -> None:
        self._head_timer = asyncio.get_running_loop().call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
