"""The corpus against a live server: each request gets a 4xx that names its field, and nobody else notices."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("jinn._native")

from tests.server.real import RealServer

from tiny import tiny_llama_gguf

from .corpus import CHAT, COMPLETIONS, KILLERS, MESSAGES, Killer

NEIGHBOUR = {"prompt": "The neighbour", "max_tokens": 200, "temperature": 1, "seed": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    model = tiny_llama_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")
    server = RealServer(str(model), "--cache-memory", "4MiB")
    try:
        yield server
    finally:
        assert server.stop() == 0


class Neighbour:
    """Streams the same answer again and again, and compares each with the first."""

    def __init__(self, server: RealServer) -> None:
        self._url = f"http://127.0.0.1:{server.port}"
        self._stop = threading.Event()
        self._expected = self._answer()
        self.num_answers = 0
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = self._answer()
            self.num_answers += 1
            if answer != self._expected:
                self.wrong.append(answer)

    def _answer(self) -> str:
        text = ""
        with httpx.stream(
            "POST", self._url + COMPLETIONS, json={**NEIGHBOUR, "stream": True}, timeout=60
        ) as r:
            for line in r.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        return text


def check_refusal(killer: Killer, response: httpx.Response) -> None:
    assert response.status_code in killer.statuses or (
        response.status_code == 404 and killer.field_name == "previous_response_id"
    ), response.text
    assert len(response.content) < 4096
    error: dict[str, Any] = response.json()["error"]
    if killer.path.startswith(MESSAGES):
        assert "messages[0]" in error["message"]
    elif killer.field_name is not None:
        # A field may be named with its place inside, or by what holds it.
        assert str(error["param"]).startswith(killer.field_name), error
    assert "Traceback" not in response.text
    assert "site-packages" not in response.text


def test_there_are_enough() -> None:
    assert len(KILLERS) >= 150
    assert len({killer.why for killer in KILLERS}) == len(KILLERS)


# httpcore leaves the socket of a body that was refused half way to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_killers(server: RealServer) -> None:
    with Neighbour(server) as neighbour:
        for killer in KILLERS:
            headers = {"content-type": "application/json", **killer.headers}
            try:
                response = httpx.post(
                    f"http://127.0.0.1:{server.port}{killer.path}",
                    content=killer.body,
                    headers=headers,
                    timeout=60,
                )
            except httpx.WriteError:  # a body that is too large is not read to its end
                assert killer.statuses == (413,), killer.why
            else:
                try:
                    check_refusal(killer, response)
                except AssertionError as error:
                    raise AssertionError(f"{killer.why}: {error}") from error
            assert server.http.get("/health").status_code == 200, killer.why
    assert neighbour.num_answers
    assert not neighbour.wrong
    server.wait_until_idle()


# Requests that HTTP libraries do not send, and how their answers may begin; b"" is a closed connection.
RAW = {
    "endless header": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 2**20,
        (b"HTTP/1.1 400", b""),
    ),
    "many headers": (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 50_000 + b"\r\n", (b"HTTP/1.1 400", b"")),
    "two lengths": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n"
        b"content-length: 3\r\n\r\n{}",
        (b"HTTP/1.1 400",),
    ),
    "length and chunks": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n"
        b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        (b"HTTP/1.1 400",),
    ),
    "bad chunk": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        (b"HTTP/1.1 400", b""),
    ),
    "negative length": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        (b"HTTP/1.1 400",),
    ),
    "huge length": (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 5368709120\r\n\r\n{",
        (b"HTTP/1.1 413",),
    ),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", (b"HTTP/1.1 400",)),
    "two hosts": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: x\r\n\r\n", (b"HTTP/1.1 400",)),
    "line break in the path": (b"GET /hea\nlth HTTP/1.1\r\nhost: localhost\r\n\r\n", (b"HTTP/1.1 400",)),
    "zero byte": (b"GET /health\x00 HTTP/1.1\r\nhost: localhost\r\n\r\n", (b"HTTP/1.1 400",)),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (b"HTTP/1.1 400", b"")),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 405", b"")),
    "upgrade": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        (b"HTTP/1.1 200", b"HTTP/1.1 400"),
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_requests(server: RealServer, name: str) -> None:
    request, beginnings = RAW[name]
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        try:
            client.sendall(request)
            answer = client.recv(1 << 16)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    assert any(answer.startswith(beginning) if beginning else not answer for beginning in beginnings), answer
    assert server.http.get("/health").status_code == 200


def test_a_chat_still_works(server: RealServer) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    assert server.http.post(CHAT, json=body).status_code == 200
    server.wait_until_idle()
