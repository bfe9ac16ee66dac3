"""Traces of requests, as an OpenTelemetry collector gets them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models
from jinn.server.serve import tracing
from jinn.server.service import Service
from jinn.server.tracing import Tracer

from .conftest import chat_body
from .fakes import ANSWER, FakeEngine

CHAT = "/v1/chat/completions"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def app(service: Service, exporter: InMemorySpanExporter) -> App:
    return App(Models.of(service), Tracer(SimpleSpanProcessor(exporter)))


def spans_of(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    spans = {span.name: span for span in exporter.get_finished_spans()}
    exporter.clear()
    return spans


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_and_its_phases(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, stream: bool
) -> None:
    began = time.time_ns()
    response = await client.post(CHAT, json=chat_body(stream=stream))
    spans = spans_of(exporter)
    root = spans.pop(f"POST {CHAT}")
    assert root.parent is None
    assert root.kind is SpanKind.SERVER
    num_prompt_tokens, num_tokens = len("user:Hello\n"), len(ANSWER.encode()) + 1
    given = {
        "gen_ai.usage.input_tokens": num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": 3,
    }
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "jinn.request_id": response.headers["x-request-id"],
        "gen_ai.usage.output_tokens": num_tokens,
        **given,
    }
    assert list(spans) == ["queue", "prefill", "decode"]
    assert dict(spans["prefill"].attributes or {}) == given
    assert dict(spans["decode"].attributes or {}) == {"gen_ai.usage.output_tokens": num_tokens}
    times: list[Any] = [root.start_time]
    for span in spans.values():
        assert span.parent is not None
        assert span.context is not None
        assert root.context is not None
        assert span.parent.span_id == root.context.span_id
        assert span.context.trace_id == root.context.trace_id
        assert span.start_time == times[-1]
        times.append(span.end_time)
    assert times == sorted(times)
    assert began - 10**9 < times[0] <= times[-1] <= root.end_time < time.time_ns() + 10**9
    assert "Hello" not in str([span.to_json() for span in (root, *spans.values())])


async def test_the_clients_trace_goes_on(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    for flag, is_sampled in (("01", True), ("00", False)):
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-{flag}"}
        await client.post(CHAT, json=chat_body(), headers=headers)
        spans = spans_of(exporter)
        assert bool(spans) == is_sampled
        for span in spans.values():
            assert span.context is not None
            assert f"{span.context.trace_id:032x}" == TRACE_ID
        if is_sampled:
            parent = spans[f"POST {CHAT}"].parent
            assert parent is not None
            assert f"{parent.span_id:016x}" == PARENT_ID
    for bad in ("", "00-x", f"00-{'0' * 32}-{PARENT_ID}-01", "é" * 100):
        await client.post(CHAT, json=chat_body(), headers={b"traceparent": bad.encode()})  # type: ignore[dict-item]
        assert spans_of(exporter)[f"POST {CHAT}"].parent is None


@pytest.mark.parametrize("name", ["jinn", "llm"])
async def test_the_services_name(monkeypatch: pytest.MonkeyPatch, service: Service, name: str) -> None:
    if name != "jinn":
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
    exporter = InMemorySpanExporter()
    transport = httpx.ASGITransport(App(Models.of(service), Tracer(SimpleSpanProcessor(exporter))))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/v1/models")
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == name


async def test_requests_that_fail(
    client: httpx.AsyncClient, engine: FakeEngine, exporter: InMemorySpanExporter
) -> None:
    await client.post(CHAT, json={})
    (refused,) = spans_of(exporter).values()
    assert refused.attributes is not None
    assert refused.attributes["http.response.status_code"] == 400
    assert refused.status.status_code is StatusCode.UNSET
    engine.fail_at = 0
    await client.post(CHAT, json=chat_body())
    spans = spans_of(exporter)
    assert spans[f"POST {CHAT}"].status.status_code is StatusCode.ERROR
    assert "decode" not in spans


async def test_what_is_not_traced(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    for path in ("/health", "/ready", "/metrics", "/no-such-route"):
        await client.get(path)
    assert not spans_of(exporter)


class Collector(BaseHTTPRequestHandler):
    bodies: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.bodies.append((self.path, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


async def test_spans_are_sent_at_the_end(service: Service) -> None:
    Collector.bodies = []
    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        async with tracing(f"http://127.0.0.1:{server.server_port}/v1/traces") as tracer:
            transport = httpx.ASGITransport(App(Models.of(service), tracer))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                assert (await client.post(CHAT, json=chat_body())).status_code == 200
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    (path,) = {path for path, _ in Collector.bodies}
    assert path == "/v1/traces"
    assert b"jinn.request_id" in b"".join(body for _, body in Collector.bodies)


async def test_without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    async with tracing(None) as tracer:
        assert tracer is None
    monkeypatch.delitem(sys.modules, "jinn.server.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"pip install 'jinn\[otel\]'"):
        async with tracing("http://127.0.0.1:4318"):
            pass


def test_nothing_is_imported_unless_asked_for() -> None:
    code = "import sys, jinn.server.app, jinn.server.serve; print('opentelemetry' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"  # noqa: S603


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "ftp://x", "http://"])
def test_the_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(ValueError, match="otlp_traces_endpoint"):
        ServerConfig(otlp_traces_endpoint=endpoint)
