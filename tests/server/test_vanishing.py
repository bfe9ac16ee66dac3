"""Clients of a real server that vanish at every phase of a request: nothing of them stays."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .real import RealServer
from .test_listener import Client

pytest.importorskip("jinn._native")

MAX_NUM_SEQS = 4  # so that most clients wait for their turn
CONCURRENCY = 50
PROMPT = {"prompt": "The capital of France is", "max_tokens": 12}
LONG_PROMPT = [{"role": "user", "content": "word " * 600}]

# How a client vanishes: what it sent, what it waited for (bytes, or seconds), whether it resets.
PHASES: list[tuple[dict[str, Any], bytes | float, bool]] = [
    ({"size": 60}, 0.0, False),  # within the headers
    ({"size": -20}, 0.0, True),  # within the body
    ({"stream": True}, 0.0, False),  # sent, perhaps not read yet
    ({"stream": True}, 0.05, True),  # in the queue
    ({"stream": False}, 0.05, False),
    ({"stream": True, "messages": LONG_PROMPT}, 0.2, False),  # while its prompt is read
    ({"stream": True}, b'"content":""', True),  # at the first chunk
    ({"stream": True}, b'"content":" ', False),  # within the stream
    ({"stream": True, "n": 3}, b'"index":2', True),
    ({"stream": True, "max_tokens": 4}, b"[DONE]", False),  # at the end
]


@pytest.fixture
def server(smollm2_path: Path) -> Iterator[RealServer]:
    server = RealServer(str(smollm2_path), "--max-num-seqs", str(MAX_NUM_SEQS), "--cache-memory", "64MiB")
    try:
        yield server
    finally:
        assert server.stop() == 0


async def vanish(port: int, phase: int) -> None:
    fields, marker, is_reset = PHASES[phase % len(PHASES)]
    client = await Client.send(port, **fields)
    if isinstance(marker, bytes):
        await client.reader.readuntil(marker)
    else:
        await asyncio.sleep(marker)
    await client.vanish(is_reset=is_reset)


async def vanish_all(port: int, num_clients: int) -> None:
    room = asyncio.Semaphore(CONCURRENCY)

    async def vanish_in_turn(phase: int) -> None:
        async with room:
            await vanish(port, phase)

    async with asyncio.timeout(60 + num_clients), asyncio.TaskGroup() as clients:
        for phase in range(num_clients):
            clients.create_task(vanish_in_turn(phase))


def left(server: RealServer) -> dict[str, Any]:
    """What the server holds once it has nothing more to do."""
    server.wait_until_idle()
    deadline = time.monotonic() + 5
    held = server.held()
    while held["requests"] and time.monotonic() < deadline:
        time.sleep(0.1)
        held = server.held()
    return {**held, "fds": server.num_fds()}


@pytest.mark.parametrize("num_clients", [100, pytest.param(10_000, marks=pytest.mark.soak)])
def test_clients_that_vanish_leave_nothing(server: RealServer, num_clients: int) -> None:
    text = server.complete(**PROMPT)
    asyncio.run(vanish_all(server.port, len(PHASES)))
    before = left(server)
    assert before["requests"] == 0
    asyncio.run(vanish_all(server.port, num_clients))
    assert left(server) == before
    time.sleep(1.5)  # the engine, idle, checks the cache's books, and would end if they did not add up
    assert server.http.get("/health").status_code == 200
    assert server.complete(**PROMPT) == text
