"""Clients that read or write almost nothing: memory stays bounded, and others are served."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("jinn._native")

from tiny import tiny_llama_gguf

from .real import RealServer

BODY = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(str(tiny_llama_gguf(tmp_path / "tiny.gguf")), "--cache-memory", "8MiB")
    try:
        yield server
    finally:
        server.stop()


def rss(server: RealServer) -> int:
    return sum(psutil.Process(process.pid).memory_info().rss for process in server.processes)


def connect(server: RealServer, data: bytes) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    client.sendall(data)
    return client


@pytest.mark.parametrize("num_clients", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_slow_readers_and_writers(server: RealServer, num_clients: int) -> None:
    body = json.dumps(BODY).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(body) + body
    server.complete(prompt="warm", max_tokens=4)
    before = rss(server)
    readers = [connect(server, request) for _ in range(num_clients)]
    heads = [connect(server, head[:40]) for _ in range(num_clients)]
    bodies = [connect(server, request[:-5]) for _ in range(num_clients)]
    try:
        for _ in range(5):
            assert server.complete(prompt="bystander", max_tokens=4) is not None
        assert rss(server) - before < 128 * 2**20
    finally:
        for client in (*readers, *heads, *bodies):
            client.close()
    server.wait_until_idle(60)
