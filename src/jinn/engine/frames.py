"""Messages on a stream of bytes: each is its length, 4 bytes little-endian, and what `encode` made of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from jinn.engine.messages import Message, encode

_LENGTH_BYTES = 4


def frame(message: Message) -> bytes:
    """The message as it goes over the stream."""
    data = encode(message)
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def read_frame(sock: socket.socket) -> bytes:
    """A blocking socket's next message, and no byte of what follows. Raises EOFError."""
    length = int.from_bytes(_read(sock, _LENGTH_BYTES), "little")
    return _read(sock, length)


def _read(sock: socket.socket, num_bytes: int) -> bytes:
    data = sock.recv(num_bytes, socket.MSG_WAITALL)
    if len(data) < num_bytes:
        raise EOFError
    return data


class FrameReader:
    """Cuts a stream, which comes in pieces of any size, into the messages' bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that `data` completes."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            stop = body + int.from_bytes(self._buffer[start:body], "little")
            if stop > len(self._buffer):
                break
            yield bytes(self._buffer[body:stop])
            start = stop
        del self._buffer[:start]
