"""The OpenAPI document against the app: whatever it allows, or forbids, no answer is a surprise."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models
from jinn.server.service import Service

from .fakes import ByteTokenizer, FakeEngine, encode_chat

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


def make_app() -> App:
    config = ServerConfig(allowed_hosts=("*",))
    service = Service(config, FakeEngine(), ByteTokenizer(), encode_chat, file_name="tiny.gguf")
    asyncio.run(service.start())
    return App(Models.of(service))


schema = schemathesis.openapi.from_asgi("/openapi.json", make_app())


def fuzzed(max_examples: int) -> Any:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=checks,
        phases=[Phase.explicit, Phase.generate],
    )


CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", {"prompt": "hi"})])
def test_a_stream_is_as_documented(path: str, body: dict[str, Any]) -> None:
    case = schema[f"/v1/{path}"]["POST"].Case(
        body={**body, "stream": True, "max_tokens": 3}, media_type="application/json"
    )
    response = case.call_and_validate(checks=CHECKS)
    assert response.status_code == 200
    assert "data: [DONE]" in response.text


@schema.parametrize()
@fuzzed(100)
def test_operation(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)


@pytest.mark.soak
@schema.parametrize()
@fuzzed(1000)
def test_operation_at_length(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)
