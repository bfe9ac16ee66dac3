"""Many clients in a process of their own: `python crowd.py PORT NUM SECONDS slow|prompt`.

Over so many seconds NUM readers ask for a stream and NUM writers for a token. Slow readers read nothing, or a
byte a second; slow writers stop within the head or the body, and go on by a byte a second.
"""

from __future__ import annotations

import json
import math
import selectors
import socket
import sys
import time
from dataclasses import dataclass

STREAM = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True, "logprobs": 20}
TOKEN = {"prompt": "x", "max_tokens": 1}
BODY_BYTES = 2**20  # of a writer's body, most of them white space
BUFFER_BYTES, SEGMENT_BYTES = 4096, 536  # so that the kernels between keep little


@dataclass
class Client:
    socket: socket.socket
    unsent: bytes = b""
    num_read_at_once: int = 0  # bytes
    is_slow: bool = False


def request(body: bytes) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


def connect(port: int, data: bytes, *, num_held: int = 0, num_read_at_once: int, is_slow: bool) -> Client:
    """A client that has sent all but the last `num_held` bytes."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
    connection.connect(("127.0.0.1", port))
    split = len(data) - num_held
    connection.sendall(data[:split])
    connection.setblocking(False)
    return Client(connection, data[split:], num_read_at_once, is_slow)


def reader(port: int, number: int, is_slow: bool) -> Client:
    data = request(json.dumps(STREAM).encode())
    return connect(port, data, num_read_at_once=number % 2 if is_slow else 2**16, is_slow=is_slow)


def writer(port: int, number: int, is_slow: bool) -> Client:
    data = request(json.dumps(TOKEN).encode().ljust(BODY_BYTES))
    num_held = (len(data) - 40 if number % 2 else 1000) if is_slow else 0
    return connect(port, data, num_held=num_held, num_read_at_once=2**16, is_slow=is_slow)


class Crowd:
    """Who is there."""

    def __init__(self) -> None:
        self._prompt = selectors.DefaultSelector()
        self._slow: list[Client] = []
        self._creep_at = time.monotonic() + 1

    def add(self, client: Client) -> None:
        if client.is_slow:
            self._slow.append(client)
        else:
            self._prompt.register(client.socket, selectors.EVENT_READ, client)

    def live(self, until: float) -> None:
        """Let each do what it does, until so late on the monotonic clock."""
        while (left := until - time.monotonic()) > 0:
            for key, _ in self._prompt.select(min(left, 0.1)):
                if not key.data.socket.recv(key.data.num_read_at_once):
                    self._prompt.unregister(key.data.socket)
                    key.data.socket.close()
            if time.monotonic() >= self._creep_at:
                self._slow = [client for client in self._slow if creep(client)]
                self._creep_at = time.monotonic() + 1


def creep(client: Client) -> bool:
    """Send or read a byte. Returns whether the server has not dropped the client."""
    try:
        if client.unsent:
            client.socket.send(client.unsent[:1])
            client.unsent = client.unsent[1:]
        elif client.num_read_at_once:
            return bool(client.socket.recv(client.num_read_at_once))
    except BlockingIOError:
        pass
    except ConnectionError:
        return False
    return True


def main(port: int, num_clients: int, seconds: float, is_slow: bool) -> None:
    crowd = Crowd()
    started_at = time.monotonic()
    for number in range(num_clients):
        crowd.add(reader(port, number, is_slow))
        crowd.add(writer(port, number, is_slow))
        crowd.live(started_at + (number + 1) * seconds / num_clients)
    print("all are there", flush=True)
    crowd.live(math.inf)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "slow")
