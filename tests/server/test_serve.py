"""`serve` as a whole: an engine process with a tiny model, the API in front of it, and their end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tiny import tiny_llama_gguf

pytest.importorskip("jinn._native")

from jinn.engine.client import EngineError
from jinn.engine.config import EngineConfig
from jinn.server.config import ServerConfig
from jinn.server.serve import serve

from .conftest import chat_body

CHAT = "/v1/chat/completions"
SCRIPT = """
import json, sys
from jinn.engine.config import EngineConfig
from jinn.server.config import ServerConfig
from jinn.server.serve import serve
serve(ServerConfig(**json.loads(sys.argv[1])), EngineConfig(**json.loads(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_gguf(tmp_path_factory.mktemp("model") / "tiny-llama.gguf")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture
def server(model: Path) -> Iterator[tuple[psutil.Process, httpx.Client]]:
    """The API's process, and a client of it."""
    port = free_port()
    settings = [json.dumps({"port": port}), json.dumps({"model": str(model), "cache_memory": 2**22})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *settings], env=environment)  # noqa: S603
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_until_ready(client)
            yield psutil.Process(process.pid), client
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert not any(child.is_running() for child in children)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def client(server: tuple[psutil.Process, httpx.Client]) -> httpx.Client:
    return server[1]


def wait_until_ready(client: httpx.Client) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.02)
    raise AssertionError("the server did not become ready")


def streamed_text(client: httpx.Client, body: dict[str, Any]) -> str:
    text = ""
    with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += choice["delta"].get("content", "")
    return text


def test_serve(client: httpx.Client) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny-llama.gguf"]
    body = chat_body(temperature=0, max_tokens=40, ignore_eos=True)
    whole = client.post(CHAT, json=body).json()
    text = whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] == 40
    assert streamed_text(client, body) == text

    seeded = chat_body(seed=5, n=2, max_tokens=20, ignore_eos=True, temperature=1)
    both = [choice["message"]["content"] for choice in client.post(CHAT, json=seeded).json()["choices"]]
    for index, text in enumerate(both):
        alone = client.post(CHAT, json={**seeded, "n": 1, "seed": 5 + index}).json()
        assert alone["choices"][0]["message"]["content"] == text

    long = chat_body(messages=[{"role": "user", "content": "x" * 300}])
    assert client.post(CHAT, json=long).json()["error"]["code"] == "context_length_exceeded"
    bad = {"prompt": [10**6]}
    assert client.post("/v1/completions", json=bad).json()["error"]["param"] == "prompt[0]"
    to_the_end = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 10**6, "ignore_eos": True})
    assert to_the_end.json()["usage"]["total_tokens"] == 256
    assert 'jinn:num_requests_running{model_name="tiny-llama.gguf"} 0.0' in client.get("/metrics").text


def test_engine_that_is_killed_comes_back(server: tuple[psutil.Process, httpx.Client]) -> None:
    process, client = server
    [engine] = [child for child in process.children() if "jinn.engine.process" in child.cmdline()]
    body = chat_body(stream=True, n=128, max_tokens=200, ignore_eos=True)  # seconds of work
    with client.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        engine.kill()
        assert '"service_unavailable"' in [line for line in lines if line][-1]
    wait_until_ready(client)
    assert client.post(CHAT, json=chat_body(max_tokens=3)).status_code == 200


def test_two_keys_share_no_cache(model: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice sk-a\nbob sk-b\nalice sk-a2\n")
    port = free_port()
    settings = [
        json.dumps({"port": port, "api_keys": str(keys)}),
        json.dumps({"model": str(model), "cache_memory": 2**22}),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, *settings], env=environment)  # noqa: S603
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            wait_until_ready(client)

            def num_cached(key: str) -> int:
                body = {"prompt": list(range(10, 110)), "max_tokens": 1}
                headers = {"authorization": f"Bearer {key}"}
                usage = client.post("/v1/completions", json=body, headers=headers).json()["usage"]
                return int(usage["prompt_tokens_details"]["cached_tokens"])

            assert [num_cached(key) for key in ("sk-a", "sk-b")] == [0, 0]
            assert min(num_cached(key) for key in ("sk-a", "sk-b", "sk-a2")) > 50
    finally:
        process.kill()
        process.wait()


def test_address_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(OSError, match="in use"):
        serve(ServerConfig(port=listener.getsockname()[1]), EngineConfig(model=str(model)))


def test_engine_that_cannot_start(model: Path) -> None:
    with pytest.raises(EngineError, match="cache_memory"):
        serve(ServerConfig(port=0), EngineConfig(model=str(model), cache_memory=1))


def test_model_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"broken\.gguf"):
        serve(ServerConfig(port=0), EngineConfig(model=str(path)))


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    """Put back what `serve` sets for its whole process: signal handlers and logging."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    root = logging.getLogger()
    log_handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = log_handlers
    root.setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)
