"""Anthropic's Messages API."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import httpx2
import pytest

from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models
from jinn.server.service import Service

from .fakes import ANSWER, FakeEngine
from .test_turns import CALLS, HYBRID, Template, ThinkingTokenizer

MESSAGES = "/v1/messages"
KEY = "sk-ant"
TOOL = {"name": "weather", "description": "d", "input_schema": {"type": "object"}}


@pytest.fixture
def template() -> Template:
    return Template()


@pytest.fixture
def service(engine: FakeEngine, template: Template) -> Service:
    config, tokenizer = ServerConfig(api_key=KEY), ThinkingTokenizer()
    return Service(config, engine, tokenizer, template, file_name="tiny.gguf", chat_format=HYBRID)


@pytest.fixture
def client(service: Service) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(App(Models.of(service)))
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers={"x-api-key": KEY})


async def ask(
    client: httpx.AsyncClient, service: Service, path: str = MESSAGES, **fields: Any
) -> httpx.Response:
    if service.ready is None:
        await service.start()
    body = {"model": "default", "max_tokens": 500, "messages": [{"role": "user", "content": "Hi"}], **fields}
    return await client.post(path, json={k: v for k, v in body.items() if v is not None})


def read_events(text: str) -> list[dict[str, Any]]:
    events = []
    for block in text.split("\n\n")[:-1]:
        kind, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1]['type']}"
    return events


def folded(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream tells, as Anthropic's client adds it up."""
    message = events[0]["message"]
    pieces: list[str] = []
    for event in events[1:]:
        if event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            pieces = []
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            if delta["type"] == "input_json_delta":
                pieces.append(delta["partial_json"])
            else:
                name = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
                block[name[delta["type"]]] += delta[name[delta["type"]]]
        elif event["type"] == "content_block_stop" and pieces:
            message["content"][-1]["input"] = json.loads("".join(pieces))
        elif event["type"] == "message_delta":
            message.update(event["delta"], usage=event["usage"])
    assert events[-1] == {"type": "message_stop"}
    return dict(message)


async def test_text(client: httpx.AsyncClient, service: Service) -> None:
    body = (await ask(client, service, system="Be brief.")).json()
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "tiny.gguf")
    assert body["content"] == [{"type": "text", "text": ANSWER}]
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    usage = body["usage"]
    assert usage["cache_read_input_tokens"] == 3
    assert usage["input_tokens"] + 3 == len("Be brief.Hi")


@pytest.mark.parametrize(
    ("fields", "reason", "stop"),
    [({"max_tokens": 3}, "max_tokens", None), ({"stop_sequences": ["x", "Seine"]}, "stop_sequence", "Seine")],
)
async def test_stop_reasons(
    client: httpx.AsyncClient, service: Service, fields: dict[str, Any], reason: str, stop: str | None
) -> None:
    for body in (
        (await ask(client, service, **fields)).json(),
        folded(read_events((await ask(client, service, **fields, stream=True)).text)),
    ):
        assert (body["stop_reason"], body["stop_sequence"]) == (reason, stop)


async def test_stream_folds_to_the_whole(
    client: httpx.AsyncClient, service: Service, engine: FakeEngine
) -> None:
    engine.answer = list(("<think>\nLet me see.\n</think>\n\n" + CALLS).encode())
    whole = (await ask(client, service, tools=[TOOL])).json()
    events = read_events((await ask(client, service, tools=[TOOL], stream=True)).text)
    streamed = folded(events)
    for block in (*whole["content"], *streamed["content"]):
        block.pop("id", None)
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole["content"] == streamed["content"]
    assert whole["content"][2]["input"] == {"city": "Paris"}
    assert whole["stop_reason"] == streamed["stop_reason"] == "tool_use"
    assert whole["usage"] == streamed["usage"]


async def test_blocks_become_messages(
    client: httpx.AsyncClient, service: Service, template: Template
) -> None:
    messages = [
        {"role": "user", "content": [
            {"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "T", "signature": "s"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "Sunny"}]},
            {"type": "tool_result", "tool_use_id": "t2", "content": "no such city", "is_error": True},
            {"type": "text", "text": "And?"}]},
    ]  # fmt: skip
    system = [{"type": "text", "text": "Be brief."}]
    response = await ask(client, service, messages=messages, system=system, tools=[TOOL])
    assert response.status_code == 200, response.text
    given = template.given["messages"]
    assert [(m["role"], m["content"]) for m in given] == [
        ("system", "Be brief."),
        ("user", "Weather?"),
        ("assistant", "I look."),
        ("tool", "Sunny"),
        ("tool", "Error: no such city"),
        ("user", "And?"),
    ]
    assert given[2]["reasoning_content"] == "T"
    assert json.loads(given[2]["tool_calls"][0]["function"]["arguments"]) == {"city": "Paris"}
    assert given[3]["tool_call_id"] == "t1"


@pytest.mark.parametrize(
    ("thinking", "effort", "budget"),
    [
        ({"type": "adaptive"}, "low", 1024),
        ({"type": "adaptive"}, "max", None),
        ({"type": "enabled", "budget_tokens": 7}, "low", 7),
        (None, "high", None),
    ],
)
async def test_effort(
    client: httpx.AsyncClient,
    service: Service,
    engine: FakeEngine,
    thinking: dict[str, Any] | None,
    effort: str,
    budget: int | None,
) -> None:
    response = await ask(client, service, thinking=thinking, output_config={"effort": effort})
    assert response.status_code == 200, response.text
    given = engine.submitted[-1].sampling.thinking_budget
    assert (given and given.max_tokens) == budget


async def test_prefill(client: httpx.AsyncClient, service: Service, template: Template) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
    assert (await ask(client, service, messages=messages)).status_code == 200
    assert template.given["continue_final_message"] is True


async def test_count_tokens(client: httpx.AsyncClient, service: Service, engine: FakeEngine) -> None:
    path = f"{MESSAGES}/count_tokens"
    assert (await ask(client, service, path, max_tokens=None)).json() == {"input_tokens": 2}
    assert not engine.submitted


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"output_config": {"effort": "some"}}, "output_config.effort"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": 3}, "temperature"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"nonsense": 1}, "nonsense"),
        ({"model": "claude"}, "claude"),
    ],
)
async def test_refusals_name_the_field(
    client: httpx.AsyncClient, service: Service, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    response = await ask(client, service, **fields)
    assert response.status_code in (400, 404)
    body = response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert f"'{param}'" in body["error"]["message"]
    assert not engine.submitted


async def test_errors_have_their_own_form(
    client: httpx.AsyncClient, service: Service, engine: FakeEngine
) -> None:
    client.headers["x-api-key"] = "wrong"
    body = (await ask(client, service)).json()
    assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
    client.headers["x-api-key"] = KEY
    engine.fail_at = 0
    assert (await ask(client, service)).json()["error"]["type"] == "api_error"
    engine.fail_at = 3
    last = (await ask(client, service, stream=True)).text.split("\n\n")[-2]
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.split("data: ")[1])["error"]["type"] == "api_error"


async def test_anthropic_client(service: Service, engine: FakeEngine) -> None:
    await service.start()
    http_client = httpx2.AsyncClient(transport=httpx2.ASGITransport(App(Models.of(service))))
    client = anthropic.AsyncAnthropic(
        api_key=KEY, base_url="http://test", http_client=http_client, max_retries=0
    )
    body: dict[str, Any] = {
        "model": "default",
        "max_tokens": 500,
        "messages": [{"role": "user", "content": "Hi"}],
    }
    message = await client.messages.create(**body)
    assert message.content[0].text == ANSWER
    async with client.messages.stream(**body) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == final.content[0].text == ANSWER
    engine.answer = list(CALLS.encode())
    async with client.messages.stream(**body, tools=[TOOL]) as stream:
        final = await stream.get_final_message()
    assert next(block.input for block in final.content if block.type == "tool_use") == {"city": "Paris"}
    assert (await client.messages.count_tokens(model="default", messages=body["messages"])).input_tokens == 2
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        await client.messages.create(**{**body, "max_tokens": 0})
