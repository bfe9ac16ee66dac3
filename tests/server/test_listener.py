"""Real sockets: clients that vanish, and signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn

from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models
from jinn.server.serve import bind
from jinn.server.service import Service

from .conftest import chat_body
from .fakes import ANSWER, ByteTokenizer, FakeEngine, encode_chat

CHAT = "/v1/chat/completions"
CONFIG = ServerConfig(allowed_hosts=("127.0.0.1",))


class Client:
    """One connection, which can be torn at any point."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def send(cls, port: int, *, size: int | None = None, **fields: object) -> Client:
        """Connect and send a chat request, or its first `size` bytes."""
        body = json.dumps(chat_body(ignore_eos=True, **fields)).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write((head.encode() + body)[:size])
        await writer.drain()
        return cls(reader, writer)

    async def vanish(self, *, is_reset: bool) -> None:
        if is_reset:
            linger = struct.pack("ii", 1, 0)
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(app: App) -> AsyncIterator[int]:
    """uvicorn in this event loop; gives its port."""
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.01)


# How a client vanishes: what it sent, whether it streams, what it waited for, whether it resets.
PHASES = [
    ({"size": 60, "stream": True}, None, False),
    ({"size": -5, "stream": True}, None, True),
    ({"stream": True}, None, False),
    ({"stream": False}, None, True),
    ({"stream": True}, b"assistant", True),
    ({"stream": True}, b"Seine"[:1], False),
    ({"stream": True, "n": 3}, b'"index":2', True),
    ({"stream": False, "n": 2}, "steps", False),
]


@pytest.mark.parametrize("num_clients", [160, pytest.param(10_000, marks=pytest.mark.soak)])
def test_vanished_clients_leave_nothing(num_clients: int) -> None:
    asyncio.run(_vanish(num_clients))


async def _vanish(num_clients: int) -> None:
    engine = FakeEngine(step_seconds=0.005)
    service = Service(CONFIG, engine, ByteTokenizer(), encode_chat, file_name="tiny.gguf")
    await service.start()
    async with serving(App(Models.of(service))) as port:

        async def client(phase: int) -> None:
            fields, marker, is_reset = PHASES[phase % len(PHASES)]
            connection = await Client.send(port, **fields)
            if isinstance(marker, bytes):
                await connection.reader.readuntil(marker)
            elif marker is not None:
                await asyncio.sleep(0.05)
            await connection.vanish(is_reset=is_reset)

        async def left() -> tuple[int, int]:
            await until(lambda: not engine.running and not service._running)
            await until(lambda: not [t for t in asyncio.all_tasks() if "run_asgi" in repr(t)])
            await asyncio.sleep(0.1)
            return len(asyncio.all_tasks()), psutil.Process().num_fds()

        await asyncio.gather(*[client(i) for i in range(len(PHASES))])
        before = await left()
        for start in range(0, num_clients, 80):
            await asyncio.gather(*[client(start + i) for i in range(80)])
        assert await left() == before
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            answer = (await http.post(CHAT, json=chat_body())).json()
        assert answer["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_stops_the_engine_within_two_steps(stream: bool) -> None:
    asyncio.run(_steps_after_disconnect(stream))


async def _steps_after_disconnect(stream: bool) -> None:
    engine = FakeEngine(step_seconds=None)
    service = Service(CONFIG, engine, ByteTokenizer(), encode_chat, file_name="tiny.gguf")
    await service.start()
    async with serving(App(Models.of(service))) as port:
        connection = await Client.send(port, stream=stream)
        await until(lambda: bool(engine.running))
        engine.step()
        await connection.vanish(is_reset=False)
        num_steps = 0
        while engine.running and num_steps < 10:
            await asyncio.sleep(0.05)  # a slow step of a real engine
            engine.step()
            num_steps += 1
    assert num_steps <= 2


async def test_kernel_drops_a_client_that_does_not_read() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        connecting = asyncio.create_task(asyncio.open_connection(*listener.getsockname()))
        accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
        with contextlib.closing(accepted):
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        _, writer = await connecting
        writer.close()
        await writer.wait_closed()


class Process:
    """`fake_server.py` as a process."""

    def __init__(self, drain_seconds: float) -> None:
        script = Path(__file__).with_name("fake_server.py")
        self.popen = subprocess.Popen(  # noqa: S603
            [sys.executable, str(script), str(drain_seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )
        assert self.popen.stdout is not None
        self.port = int(self.popen.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url + "/ready").status_code == 200:
                    return
            time.sleep(0.02)
        raise AssertionError("the server did not become ready")

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def end(self) -> tuple[int, str, str]:
        """Exit status, the last line of output, and the log."""
        output, log = self.popen.communicate(timeout=15)
        return self.popen.returncode, output.strip(), log


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[Process]:
    process = Process(request.param)
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.popen.kill()
        process.popen.communicate()


def stream_lines(process: Process, **fields: object) -> Iterator[str]:
    body = chat_body(stream=True, **fields)
    with httpx.stream("POST", process.url + CHAT, json=body, timeout=20) as response:
        yield from response.iter_lines()


@pytest.mark.parametrize("process", [10.0], indirect=True)
def test_sigterm_lets_requests_finish(process: Process) -> None:
    lines = stream_lines(process)
    text = [next(lines)]
    process.terminate()
    time.sleep(0.1)
    for response in (httpx.get(process.url + "/ready"), httpx.post(process.url + CHAT, json=chat_body())):
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
    assert httpx.get(process.url + "/health").status_code == 200
    text += lines
    assert text[-2:] == ["data: [DONE]", ""]
    status, output, log = process.end()
    assert (status, output) == (0, "running=0 tasks=0")
    assert "Traceback" not in log
    access = [json.loads(line) for line in log.splitlines() if '"route": "/v1/chat/completions"' in line]
    assert [(line["status"], line.get("completion_tokens")) for line in access] == [
        (503, None),
        (200, len(ANSWER.encode()) + 1),
    ]


@pytest.mark.parametrize("process", [0.3], indirect=True)
def test_sigterm_cuts_at_the_deadline(process: Process) -> None:
    lines = stream_lines(process, ignore_eos=True)
    text = [next(lines)]
    process.terminate()
    started_at = time.monotonic()
    text += lines
    assert json.loads(text[-2].removeprefix("data: "))["error"]["code"] == "service_unavailable"
    assert process.end()[:2] == (0, "running=0 tasks=0")
    assert 0.2 < time.monotonic() - started_at < 2.3


@pytest.mark.parametrize("process", [60.0], indirect=True)
def test_second_sigterm_cuts_at_once(process: Process) -> None:
    lines = stream_lines(process, ignore_eos=True)
    next(lines)
    process.terminate()
    time.sleep(0.1)
    process.terminate()
    assert '"error"' in list(lines)[-2]
    assert process.end()[:2] == (0, "running=0 tasks=0")


@pytest.mark.parametrize("process", [60.0], indirect=True)
def test_sigterm_when_idle_ends_at_once(process: Process) -> None:
    process.terminate()
    started_at = time.monotonic()
    assert process.end()[0] == 0
    assert time.monotonic() - started_at < 2
