"""Traces of requests for OpenTelemetry, from the times that are taken anyway; nothing is done per token.

Imported only where traces are asked for, since it needs the extra `otel`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from jinn.server.generation import Usage

_CONTEXT_HEADERS = (b"traceparent", b"tracestate")  # W3C's Trace Context

Attributes = dict[str, str | int]


class Tracer:
    """Writes a span for each request, and below it one for each phase of its generation.

    Whether a request is sampled, its `traceparent` says, else `OTEL_TRACES_SAMPLER`.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=_resource())
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("jinn.server")
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Tracer:
        """Spans go to this URL by OTLP over HTTP, from a thread, and are dropped while it cannot follow."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    def record(self, scope: Scope, status: int, ended_at: float) -> None:
        """Write the spans of a request to a known route, which ended at this time.monotonic()."""
        state = scope["state"]
        unix_time = _unix_clock()
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]
                   if name in _CONTEXT_HEADERS}  # fmt: skip
        span = self._tracer.start_span(
            f"{scope['method']} {scope['route'].path}",
            self._propagator.extract(headers),
            SpanKind.SERVER,
            _request_attributes(scope, status),
            start_time=unix_time(state["arrived_at"]),
        )
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        for phase in state.get("phases", ()):
            self._tracer.start_span(
                phase.name,
                set_span_in_context(span),
                attributes=_phase_attributes(phase.name, state["usage"]),
                start_time=unix_time(phase.start),
            ).end(unix_time(phase.end))
        span.end(unix_time(ended_at))

    def close(self) -> None:
        """Send what is left. May take seconds where the endpoint does not answer."""
        self._provider.shutdown()


def _resource() -> Resource:
    """What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say; else the service is jinn."""
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        return resource.merge(Resource({"service.name": "jinn"}))
    return resource


def _unix_clock() -> Callable[[float], int]:
    """Makes nanoseconds since 1970 of time.monotonic()."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda seconds: offset + int(seconds * 1e9)


def _request_attributes(scope: Scope, status: int) -> Attributes:
    """By OpenTelemetry's names where it has one. Never a header or what was said."""
    state: dict[str, Any] = scope["state"]
    attributes: Attributes = {
        "http.request.method": scope["method"],
        "http.route": scope["route"].path,
        "http.response.status_code": status,
        "jinn.request_id": state["request_id"],
    }
    if key_name := state.get("key_name"):
        attributes["jinn.key"] = key_name
    if usage := state.get("usage"):
        attributes |= _input_attributes(usage) | _output_attributes(usage)
    return attributes


def _phase_attributes(name: str, usage: Usage) -> Attributes:
    return {"prefill": _input_attributes, "decode": _output_attributes}.get(name, lambda _: {})(usage)


def _input_attributes(usage: Usage) -> Attributes:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
    }


def _output_attributes(usage: Usage) -> Attributes:
    return {"gen_ai.usage.output_tokens": usage.completion_tokens}
