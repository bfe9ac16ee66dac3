"""Keys from a file, hosts, origins, TLS and the limits of a connection."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from jinn.logs import JSONFormatter
from jinn.server import protocol as protocol_module
from jinn.server import service as service_module
from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.errors import APIError
from jinn.server.keys import KeyFile, Keyring, read_keys
from jinn.server.listener import listen
from jinn.server.models import Models
from jinn.server.serve import bind, bind_unix
from jinn.server.service import Service, Throughput

from .conftest import chat_body
from .fakes import ByteTokenizer, FakeEngine, encode_chat
from .test_app import check_error

CHAT = "/v1/chat/completions"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    digest = hashlib.sha256(b"sk-bob").hexdigest()
    path.write_text(f"# team\n\nalice sk-alice\nbob   sha256:{digest}\nalice sk-alice-2\n")
    return path


def make_service(config: ServerConfig, engine: FakeEngine | None = None) -> Service:
    service = Service(config, engine or FakeEngine(), ByteTokenizer(), encode_chat, file_name="tiny.gguf")
    asyncio.run(service.start())
    return service


def http(service: Service, base_url: str = "http://test", **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(App(Models.of(service)))
    return httpx.AsyncClient(transport=transport, base_url=base_url, headers=headers)


class TestKeyFile:
    async def ask(self, service: Service, **headers: str) -> httpx.Response:
        async with http(service, **headers) as client:
            return await client.post(CHAT, json=chat_body(max_tokens=1))

    def test_names_are_tenants_and_logged(self, key_file: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        engine = FakeEngine()
        service = make_service(ServerConfig(api_keys=str(key_file), api_key="sk-operator"), engine)

        async def ask_all() -> None:
            for key in ("sk-alice", "sk-bob", "sk-alice-2", "sk-operator"):
                assert (await self.ask(service, authorization=f"Bearer {key}")).status_code == 200
            assert (await self.ask(service, **{"x-api-key": "sk-bob"})).status_code == 200
            check_error(await self.ask(service, authorization="Bearer sk-eve"), 401, "invalid_api_key")
            check_error(await self.ask(service), 401, "invalid_api_key")

        asyncio.run(ask_all())
        tenants = [submit.tenant for submit in engine.submitted]
        assert tenants == ["key:alice", "key:bob", "key:alice", "key:default", "key:bob"]
        lines = "\n".join(map(JSONFormatter().format, caplog.records))
        assert '"key": "alice"' in lines
        assert "sk-" not in lines

    def test_change_is_seen(self, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("jinn.server.keys._CHECK_SECONDS", 0)
        ring = Keyring(None, KeyFile(str(key_file)))
        assert ring.holder("sk-alice").name == "alice"
        key_file.write_text("carol sk-carol\n")
        assert ring.holder("sk-carol").name == "carol"
        with pytest.raises(APIError):
            ring.holder("sk-alice")
        for broken in ("dave\n", ""):
            key_file.write_text(broken)
            assert ring.holder("sk-carol").name == "carol"
        key_file.unlink()
        assert ring.holder("sk-carol").name == "carol"

    def test_reload_does_not_wait(self, key_file: Path) -> None:
        ring = Keyring(None, KeyFile(str(key_file)))
        key_file.write_text("carol sk-carol\n")
        ring.reload()
        assert ring.holder("sk-carol").name == "carol"

    @pytest.mark.parametrize(
        "text", ["alice\n", "alice a b\n", "al/ce sk\n", "alice sk\nbob sk\n", "# none\n", f"{'x' * 65} sk\n"]
    )
    def test_bad_file_names_the_line_and_no_key(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "keys"
        path.write_text(text)
        with pytest.raises(ValueError, match=str(path)) as caught:
            read_keys(path)
        assert "sk" not in str(caught.value).removeprefix(str(path))

    def test_a_file_opens_a_public_address(self, key_file: Path) -> None:
        ServerConfig(host="0.0.0.0", api_keys=str(key_file))  # noqa: S104


class TestHosts:
    @pytest.mark.parametrize(
        ("host", "is_answered"),
        [
            ("localhost", True),
            ("LOCALHOST:8000", True),
            ("127.0.0.1:80", True),
            ("[::1]:8000", True),
            ("[::1]", True),
            ("evil.example", False),
            ("localhost.evil.example", False),
            ("localhost@evil.example", False),
            ("x/health?y=", False),
            ("", False),
            ("localhost:8000:1", False),
        ],
    )
    async def test_without_keys_only_this_machine(self, host: str, is_answered: bool) -> None:
        async with http(await self.started(ServerConfig()), host=host) as client:
            for path in ("/health", "/v1/models"):
                response = await client.get(path)
                if is_answered:
                    assert response.status_code == 200
                else:
                    assert check_error(response, 400, "invalid_host")["param"] == "host"

    async def test_allowed_hosts(self) -> None:
        service = await self.started(ServerConfig(allowed_hosts=("api.example", "b.example")))
        for host, status in (("API.example:1", 200), ("b.example", 200), ("localhost", 400)):
            async with http(service, host=host) as client:
                assert (await client.get("/health")).status_code == status

    async def test_with_keys_any(self) -> None:
        async with http(await self.started(ServerConfig(api_key="k")), host="any.example") as client:
            assert (await client.get("/health")).status_code == 200

    async def started(self, config: ServerConfig) -> Service:
        service = Service(config, FakeEngine(), ByteTokenizer(), encode_chat, file_name="tiny.gguf")
        await service.start()
        return service


class TestOrigins:
    PREFLIGHT = {  # noqa: RUF012
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }

    async def test_none_by_default(self, client: httpx.AsyncClient) -> None:
        headers = {"origin": "https://chat.example"}
        assert (await client.options(CHAT, headers={**headers, **self.PREFLIGHT})).status_code == 405
        response = await client.get("/v1/models", headers=headers)
        assert not any(name.startswith("access-control") for name in response.headers)

    def test_allowed(self) -> None:
        config = ServerConfig(api_key="k", allowed_origins=("https://chat.example",))
        service = make_service(config)

        async def ask() -> None:
            async with http(service, authorization="Bearer k") as client:
                for origin, allowed in (("https://chat.example", True), ("https://evil.example", False)):
                    headers = {"origin": origin}
                    preflight = await client.options(CHAT, headers={**headers, **self.PREFLIGHT})
                    answer = await client.get("/v1/models", headers=headers)
                    assert (preflight.status_code == 200) is allowed
                    for response in (preflight, answer):
                        assert (response.headers.get("access-control-allow-origin") == origin) is allowed
                        assert "access-control-allow-credentials" not in response.headers

        asyncio.run(ask())

    def test_bad_origin_names_the_field(self) -> None:
        with pytest.raises(ValueError, match="allowed_origins"):
            ServerConfig(allowed_origins=("chat.example",))


async def test_public_metrics() -> None:
    for is_public, status in ((True, 200), (False, 401)):
        config = ServerConfig(api_key="k", public_metrics=is_public)
        service = Service(config, FakeEngine(), ByteTokenizer(), encode_chat, file_name="tiny.gguf")
        async with http(service) as client:
            assert (await client.get("/metrics")).status_code == status
            assert (await client.get("/openapi.json")).status_code == 401


def test_full_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(step_seconds=0.01)
    service = make_service(ServerConfig(allowed_hosts=("test",), max_queue=2), engine)

    async def ask() -> None:
        async with http(service) as client:
            num_allowed = 64 + 2  # the fake engine's max_num_seqs, and the queue
            body = chat_body(max_tokens=5)
            answers = await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(num_allowed + 3)))
            refused = [answer for answer in answers if answer.status_code != 200]
            assert len(refused) == 3
            for answer in refused:
                assert check_error(answer, 429, "queue_full")["type"] == "rate_limit_error"
                assert int(answer.headers["retry-after"]) >= 1
            assert (await client.post(CHAT, json=body)).status_code == 200

    asyncio.run(ask())


def test_retry_after_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(service_module.time, "monotonic", lambda: now)
    throughput = Throughput()
    assert throughput.seconds_for(3) == service_module.RETRY_SECONDS
    for _ in range(10):
        throughput.count()
        now += 2.5
    assert throughput.seconds_for(3) == 8
    assert throughput.seconds_for(10**6) == service_module.MAX_RETRY_SECONDS


class Served:
    """A server on a real socket, in this event loop."""

    def __init__(self, config: ServerConfig, listener: socket.socket) -> None:
        self.config, self.listener = config, listener

    async def __aenter__(self) -> Served:
        self.service = Service(self.config, FakeEngine(), ByteTokenizer(), encode_chat, file_name="tiny.gguf")
        models = Models.of(self.service)
        self.task = asyncio.create_task(listen(App(models), models, self.listener))
        while self.service.ready is None:
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        os.kill(os.getpid(), 15)
        await self.task
        self.listener.close()


async def raw_answer(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


async def slow_reader(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Of a stream of some megabytes; it reads nothing before it is told to."""
    body = json.dumps(chat_body(stream=True, logprobs=True, top_logprobs=20, max_tokens=800, ignore_eos=True))
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # so that the kernel keeps little
    connection.connect(("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    head = "host: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    length = f"content-length: {len(body)}\r\n\r\n"
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}{length}{body}".encode())
    return reader, writer


@pytest.mark.usefixtures("restored_signals")
class TestConnections:
    async def test_head_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(protocol_module, "HEAD_SECONDS", 0.3)
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        async with Served(ServerConfig(), listener):
            started_at = time.monotonic()
            for silent in (b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: "):
                assert await raw_answer(port, silent) == b""
            kept = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /hea"
            answer = await raw_answer(port, kept)
            assert answer.count(b"HTTP/1.1 200") == 1
            assert time.monotonic() - started_at < 9
            long = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 33 * 1024
            assert b'"code": "invalid_http"' in await raw_answer(port, long)
            assert b'"code": "invalid_http"' in await raw_answer(port, b"\x16\x03\x01\r\n\r\n")
            two = b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n"
            assert b" 400 " in (await raw_answer(port, two)).split(b"\r\n")[0]

    async def test_the_slowest_reader_is_dropped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(protocol_module, "MAX_UNREAD_BYTES", 2**19)
        listener = bind("127.0.0.1", 0)
        async with Served(ServerConfig(), listener) as served:

            async def ask() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                streams = await slow_reader(listener.getsockname()[1])
                while not served.service._running:
                    await asyncio.sleep(0.01)
                while served.service._running:  # nobody waits for the client to read
                    await asyncio.sleep(0.01)
                await asyncio.sleep(3 * protocol_module._CHECK_SECONDS)
                return streams

            async def is_whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
                answer = await reader.read()
                writer.close()
                return answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

            async with asyncio.timeout(20):
                assert await is_whole(*await ask())  # the only one, with more than all may have
                first, second = await ask(), await ask()
                assert not await is_whole(*first)
                assert await is_whole(*second)

    async def test_tls(self, tmp_path: Path) -> None:
        key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
        subprocess.run(  # noqa: S603
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",  # noqa: S607
             "-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
             "-keyout", str(key), "-out", str(certificate)],
            check=True, capture_output=True,
        )  # fmt: skip
        config = ServerConfig(tls_certificate=str(certificate), tls_key=str(key))
        listener = bind("127.0.0.1", 0)
        url = f"https://localhost:{listener.getsockname()[1]}"
        async with Served(config, listener):
            context = ssl.create_default_context(cafile=str(certificate))
            async with httpx.AsyncClient(verify=context, base_url=url) as client:
                assert (await client.get("/health")).status_code == 200

    async def test_unix_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "jinn.sock"
        bind_unix(str(path)).close()  # what a server left behind
        listener = bind_unix(str(path))
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(OSError, match="in use"):
            bind_unix(str(path))
        async with Served(ServerConfig(host="0.0.0.0", unix_socket=str(path)), listener):  # noqa: S104
            transport = httpx.AsyncHTTPTransport(uds=str(path))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [{"tls_key": "k.pem"}, {"tls_certificate": "c.pem"}, {"max_queue": -1}, {"allowed_origins": ("x",)}],
)
def test_bad_config_names_the_field(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ServerConfig(**fields)
