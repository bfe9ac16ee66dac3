"""Clients that read or write almost nothing: memory stays bounded, and others are served as fast as ever."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

import psutil
import pytest

pytest.importorskip("jinn._native")

from tiny import tiny_llama_gguf

from .real import RealServer

MAX_GROWTH = 128 * 2**20
SECONDS = 125.0  # in which a thousand come, so that the server has some time left
PAUSE_SECONDS = 0.02  # between a bystander's requests


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RealServer]:
    server = RealServer(str(tiny_llama_gguf(tmp_path / "tiny.gguf")), "--cache-memory", "8MiB")
    try:
        yield server
    finally:
        server.stop()


def rss(server: RealServer) -> int:
    return sum(psutil.Process(process.pid).memory_info().rss for process in server.processes)


def beside(server: RealServer, num_clients: int, seconds: float, kind: str) -> tuple[list[float], int]:
    """What a bystander waits for each of its answers while such clients arrive, and the most memory taken."""
    arguments = map(str, (server.port, num_clients, seconds, kind))
    crowd = subprocess.Popen(  # noqa: S603
        [sys.executable, str(Path(__file__).with_name("crowd.py")), *arguments], stdout=subprocess.PIPE
    )
    waits, most_memory = [], 0
    try:
        while not select.select([crowd.stdout], [], [], PAUSE_SECONDS)[0]:
            started_at = time.perf_counter()
            server.complete(prompt="bystander", max_tokens=4)
            waits.append(time.perf_counter() - started_at)
            most_memory = max(most_memory, rss(server))
        assert crowd.stdout is not None
        assert crowd.stdout.readline() == b"all are there\n"
    finally:
        crowd.kill()
        crowd.communicate()
    server.wait_until_idle(60)
    return waits, most_memory


def p99(waits: list[float]) -> float:
    return quantiles(waits, n=100)[-1]


def test_slow_clients_take_little_memory(server: RealServer) -> None:
    server.complete(prompt="warm", max_tokens=4)
    before = rss(server)
    waits, most_memory = beside(server, 300, 4.0, "slow")
    assert most_memory - before <= MAX_GROWTH
    assert waits


@pytest.mark.soak
def test_slow_clients_keep_nobody_waiting(server: RealServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.complete(prompt="warm", max_tokens=4)
    before = rss(server)
    prompt_waits, _ = beside(server, 1000, SECONDS, "prompt")
    slow_waits, most_memory = beside(server, 1000, SECONDS, "slow")
    ratio = p99(slow_waits) / p99(prompt_waits)
    growth = most_memory - before
    with capsys.disabled():
        print(
            f"\n1,000 readers and 1,000 writers: {growth / 2**20:.0f} MiB more, a bystander's p99 of "
            f"{len(slow_waits)} {p99(slow_waits) * 1e3:.1f} ms, {ratio:.2f} of that beside prompt ones"
        )
    assert growth <= MAX_GROWTH
    assert ratio <= 1.2
