"""Errors, keys and routes."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import httpx
import pytest

from jinn.logs import JSONFormatter
from jinn.server import body as body_module
from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.generation import Generation
from jinn.server.models import Models
from jinn.server.responses import ErrorResponse
from jinn.server.service import Service

from .conftest import chat_body
from .fakes import MAX_MODEL_LEN, ByteTokenizer, FakeEngine, encode_chat

CHAT = "/v1/chat/completions"
KEY = "sk-canary-7f3a"

# Every route: its method, an example path, and who may call it. A route that is missing here fails a test.
ROUTES = {
    "/health": ("GET", "/health", "public"),
    "/ready": ("GET", "/ready", "public"),
    "/": ("GET", "/", "public"),
    "/page.js": ("GET", "/page.js", "public"),
    "/page.css": ("GET", "/page.css", "public"),
    "/metrics": ("GET", "/metrics", "key"),
    "/openapi.json": ("GET", "/openapi.json", "key"),
    "/v1/models": ("GET", "/v1/models", "key"),
    "/v1/models/{model:path}": ("GET", "/v1/models/tiny", "key"),
    "/v1/chat/completions": ("POST", CHAT, "key"),
    "/v1/completions": ("POST", "/v1/completions", "key"),
    "/v1/responses": ("POST", "/v1/responses", "key"),
    "/v1/responses/{response_id}": ("GET", "/v1/responses/x", "key"),
    "/v1/responses/{response_id}/cancel": ("POST", "/v1/responses/x/cancel", "key"),
    "/v1/responses/{response_id}/input_items": ("GET", "/v1/responses/x/input_items", "key"),
    "/v1/messages": ("POST", "/v1/messages", "key"),
    "/v1/messages/count_tokens": ("POST", "/v1/messages/count_tokens", "key"),
    "/v1/embeddings": ("POST", "/v1/embeddings", "key"),
    "/v1/rerank": ("POST", "/v1/rerank", "key"),
    "/v1/score": ("POST", "/v1/score", "key"),
    "/tokenize": ("POST", "/tokenize", "key"),
    "/detokenize": ("POST", "/detokenize", "key"),
    "/tokenizer_info": ("GET", "/tokenizer_info", "key"),
}
BODIES = {
    CHAT: chat_body(max_tokens=1),
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/embeddings": {"input": "x"},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/v1/score": {"text_1": "x", "text_2": "y"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [65]},
}


def check_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch(r"req_[0-9a-f]{24}", response.headers["x-request-id"])
    ErrorResponse.model_validate_json(response.content)
    assert not re.search(r"0x[0-9a-f]{6,}|/home|/root|site-packages|Traceback|Error\b", response.text)
    error: dict[str, Any] = response.json()["error"]
    if code is not None:
        assert error["code"] == code
    return error


class TestKeys:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(api_key=KEY)

    async def call(self, client: httpx.AsyncClient, path: str, **headers: str) -> httpx.Response:
        method, example, _ = ROUTES[path]
        return await client.request(method, example, json=BODIES.get(example), headers=headers)

    def test_every_route_is_in_the_table(self, app: App) -> None:
        assert set(paths(app.routes)) == set(ROUTES)

    @pytest.mark.parametrize("path", ROUTES)
    async def test_matrix(self, client: httpx.AsyncClient, path: str) -> None:
        access = ROUTES[path][2]
        for authorization in (
            None,
            "",
            KEY,
            f"Basic {KEY}",
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
            "Bearer",
        ):
            headers = {} if authorization is None else {"authorization": authorization}
            for host in ("test", "x/health?y=", "localhost/ready#", "evil.example"):
                response = await self.call(client, path, host=host, **headers)
                if access == "public":
                    assert response.status_code == 200
                else:
                    assert response.status_code == 401
                    assert response.headers["www-authenticate"] == "Bearer"
                    if not path.startswith("/v1/messages"):  # which have a form of their own
                        check_error(response, 401, "invalid_api_key")
        found = 404 if "{response_id}" in path else 200
        for authorization in (f"Bearer {KEY}", f"bearer  {KEY} "):
            assert (await self.call(client, path, authorization=authorization)).status_code == found

    @pytest.mark.parametrize(
        "path",
        [
            "//v1/models",
            "/v1/models/../health",
            "/v1//models",
            "/health/",
            "/v1/models;/health",
            "/%2e/v1/models",
            "/docs",
            "/health/../v1/models",
            "/V1/models",
            "/v1/models%00",
            "/health%2f..%2fv1%2fmodels",
            "/openapi.json/",
        ],
    )
    async def test_other_spellings_open_nothing(self, app: App, path: str) -> None:
        transport = httpx.ASGITransport(app)
        raw = httpx.Request("GET", httpx.URL("http://test").copy_with(raw_path=path.encode()))
        response = await transport.handle_async_request(raw)
        assert response.status_code in (401, 404)

    async def test_body_is_not_read_without_a_key(self, client: httpx.AsyncClient) -> None:
        response = await client.post(CHAT, content=b"\xff not json")
        check_error(response, 401, "invalid_api_key")

    async def test_tenant_is_not_the_key(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        await self.call(client, CHAT, authorization=f"Bearer {KEY}")
        (submit,) = engine.submitted
        assert submit.tenant == "key:default"
        assert KEY not in repr(submit)

    async def test_key_is_nowhere_in_logs(
        self, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        for authorization in (f"Bearer {KEY}", f"Bearer {KEY}2"):
            await self.call(client, CHAT, authorization=authorization)
        lines = "\n".join(map(JSONFormatter().format, caplog.records))
        assert "jinn.access" in lines
        assert KEY not in lines
        assert "Hello" not in lines
        assert KEY not in repr(ServerConfig(api_key=KEY))


def paths(routes: list[Any]) -> list[str]:
    """The paths of all routes, also of those within included routers and mounted apps."""
    found = []
    for route in routes:
        inner = getattr(route, "original_router", route)
        found += paths(inner.routes) if getattr(inner, "routes", None) else [route.path]
    return found


def test_public_address_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.com", ""):  # noqa: S104
        with pytest.raises(ValueError, match="api_key"):
            ServerConfig(host=host)
        ServerConfig(host=host, api_key=KEY)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.0.1"):
        ServerConfig(host=host)


@pytest.mark.parametrize(
    "fields",
    [
        {"port": -1},
        {"port": 65536},
        {"api_key": ""},
        {"api_key": " x"},
        {"served_model_name": ""},
        {"log_level": "loud"},
        {"drain_seconds": -1.0},
        {"drain_seconds": float("nan")},
    ],
)
def test_bad_config_names_the_field(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        ServerConfig(**fields)


async def test_router_errors(client: httpx.AsyncClient) -> None:
    check_error(await client.get("/nope"), 404, "not_found")
    check_error(await client.get(CHAT), 405, "method_not_allowed")
    check_error(await client.post("/health"), 405, "method_not_allowed")
    check_error(await client.get("/v1/models/other/model"), 404, "model_not_found")
    error = check_error(await client.post(CHAT, json=chat_body(model="gpt-4")), 404, "model_not_found")
    assert (error["param"], error["type"]) == ("model", "invalid_request_error")


async def test_media_types(client: httpx.AsyncClient) -> None:
    for headers in (
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ):
        check_error(await client.post(CHAT, content=b"{}", headers=headers), 415, "unsupported_media_type")
    good = {"content-type": "Application/JSON; charset=utf-8"}
    check_error(await client.post(CHAT, content=b"{}", headers=good), 400, "missing_required_parameter")


async def test_prompt_too_long(client: httpx.AsyncClient) -> None:
    body = {"prompt": [65] * MAX_MODEL_LEN}
    error = check_error(await client.post("/v1/completions", json=body), 400, "context_length_exceeded")
    assert error["param"] == "prompt"
    assert error["message"].count(str(MAX_MODEL_LEN)) == 2
    long = chat_body(messages=[{"role": "user", "content": "x" * 5000}])
    error = check_error(await client.post(CHAT, json=long), 400, "context_length_exceeded")
    assert "5006" in error["message"]
    assert (
        await client.post("/v1/completions", json={"prompt": [65] * (MAX_MODEL_LEN - 1)})
    ).status_code == 200


async def test_min_tokens_that_do_not_fit(client: httpx.AsyncClient) -> None:
    body = {"prompt": [65] * 4000, "min_tokens": 97, "max_tokens": 100}
    assert check_error(await client.post("/v1/completions", json=body), 400)["param"] == "min_tokens"


async def test_empty_prompt(client: httpx.AsyncClient) -> None:
    for prompt in ("", [[]], ["a", ""]):
        error = check_error(await client.post("/v1/completions", json={"prompt": prompt}), 400)
        assert error["param"] == "prompt"


async def test_template_refusal(client: httpx.AsyncClient) -> None:
    body = chat_body(messages=[{"role": "user", "content": "refuse"}])
    assert check_error(await client.post(CHAT, json=body), 400)["param"] == "messages"


async def test_body_limits(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    response = await client.post(CHAT, content=b" " * (9 * 2**20), headers=headers)
    check_error(response, 413, "request_too_large")

    async def endless() -> Any:
        for _ in range(100):
            yield b" " * 2**20

    response = await client.post(CHAT, content=endless(), headers=headers)
    check_error(response, 413, "request_too_large")
    assert response.headers["connection"] == "close"


async def test_slow_body(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "BODY_SECONDS", 0.01)

    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(0.1)
        yield b"}"

    response = await client.post(CHAT, content=slow(), headers={"content-type": "application/json"})
    check_error(response, 408, "request_timeout")


@pytest.mark.parametrize("fields", [{}, {"n": 3}])
async def test_engine_error_before_the_first_token(
    client: httpx.AsyncClient, engine: FakeEngine, service: Service, fields: dict[str, Any]
) -> None:
    engine.fail_at = 0
    for stream in (False, True):
        response = await client.post(CHAT, json=chat_body(stream=stream, **fields))
        check_error(response, 500, "internal_error")
    assert not engine.running
    assert not service._running


async def test_engine_error_in_a_stream(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_at = 2
    response = await client.post(CHAT, json=chat_body(stream=True))
    *_, last, empty = response.text.split("\n\n")
    assert empty == ""
    error = ErrorResponse.model_validate_json(last.removeprefix("data: ")).error
    assert error.code == "internal_error"
    assert "secret" not in response.text


async def test_unexpected_exception(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("secret prompt")

    monkeypatch.setattr(Generation, "deltas", explode)
    for stream in (False, True):
        check_error(await client.post(CHAT, json=chat_body(stream=stream)), 500, "internal_error")
    lines = "\n".join(map(JSONFormatter().format, caplog.records))
    assert "RuntimeError" in lines
    assert "secret prompt" not in lines


async def test_not_ready_and_draining(engine: FakeEngine, config: ServerConfig) -> None:
    service = Service(config, engine, ByteTokenizer(), encode_chat, file_name="tiny.gguf")
    transport = httpx.ASGITransport(App(Models.of(service)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def refused() -> None:
            for response in (await client.get("/ready"), await client.post(CHAT, json=chat_body())):
                check_error(response, 503, "service_unavailable")
                assert int(response.headers["retry-after"]) > 0

        await refused()
        assert (await client.get("/health")).status_code == 200
        await service.start()
        assert (await client.get("/ready")).status_code == 200
        await service.drain()
        await refused()
        assert (await client.get("/health")).status_code == 200
        service.is_draining = False
        engine.is_alive = False
        await refused()
        check_error(await client.get("/health"), 503)


async def test_openapi(client: httpx.AsyncClient, app: App) -> None:
    document = (await client.get("/openapi.json")).json()
    assert set(document["paths"]) == {path.replace(":path", "") for path in ROUTES}
    schemas = document["components"]["schemas"]
    chat = schemas["ChatRequest"]["properties"]
    assert chat["n"]["maximum"] == 128
    assert chat["tools"]["maxItems"] == 128
    assert chat["functions"]["enum"] == [None, []]
    assert "description" in chat["user"]
    operation = document["paths"][CHAT]["post"]
    assert operation["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]
    event = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    chunk, end = event["properties"]["data"]["anyOf"]
    names = [reference["$ref"].rsplit("/")[-1] for reference in chunk["contentSchema"]["anyOf"]]
    assert names == ["ChatCompletionChunk", "ErrorResponse"]
    assert end == {"const": "[DONE]"}
    for name in re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', str(document).replace("'", '"')):
        assert name in schemas
