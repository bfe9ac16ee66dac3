"""The Responses API: items, events, continuation, and what one key may see."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models
from jinn.server.response_store import ResponseStore, StoredResponse
from jinn.server.service import Service

from .fakes import ANSWER, FakeEngine
from .test_app import check_error
from .test_turns import CALLS, HYBRID, Template, ThinkingTokenizer

RESPONSES = "/v1/responses"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture
def template() -> Template:
    return Template()


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(allowed_hosts=("test",))


@pytest.fixture
def service(engine: FakeEngine, config: ServerConfig, template: Template) -> Service:
    tokenizer = ThinkingTokenizer()
    return Service(config, engine, tokenizer, template, file_name="tiny.gguf", chat_format=HYBRID)


@pytest.fixture
def client(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(App(Models.of(service))), base_url="http://test")


async def ask(client: httpx.AsyncClient, service: Service, **body: Any) -> httpx.Response:
    if service.ready is None:
        await service.start()
    return await client.post(RESPONSES, json=body)


def read_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose grammar is checked on the way."""
    events = []
    *blocks, empty = text.split("\n\n")
    assert empty == ""
    for block in blocks:
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_text(client: httpx.AsyncClient, service: Service) -> None:
    body = (await ask(client, service, input="Hi", metadata={"a": "b"})).json()
    assert (body["object"], body["status"], body["error"]) == ("response", "completed", None)
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    content = {"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}
    assert item["content"] == [content]
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 3}
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + body["usage"]["output_tokens"]
    assert body["metadata"] == {"a": "b"}


async def test_cut(client: httpx.AsyncClient, service: Service) -> None:
    body = (await ask(client, service, input="Hi", max_output_tokens=5)).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    events = read_events((await ask(client, service, input="Hi", max_output_tokens=5, stream=True)).text)
    assert events[-1]["type"] == "response.incomplete"


async def test_stream_folds_to_the_whole(
    client: httpx.AsyncClient, service: Service, engine: FakeEngine
) -> None:
    engine.answer = list(("<think>\nLet me see.\n</think>\n\n" + CALLS).encode())
    body = {"input": "Hi", "tools": [TOOL], "temperature": 0}
    whole = (await ask(client, service, **body)).json()
    events = read_events((await ask(client, service, **body, stream=True)).text)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[-1]["type"] == "response.completed"

    def plain(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]

    streamed = events[-1]["response"]["output"]
    assert plain(streamed) == plain(whole["output"])
    assert [item["type"] for item in streamed] == ["reasoning", "message", "function_call", "function_call"]
    assert [json.loads(item["arguments"])["city"] for item in streamed[2:]] == ["Paris", "Köln"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == streamed
    for index, item in enumerate(streamed):
        of_item = [event for event in events if event.get("output_index") == index]
        assert of_item[0]["type"] == "response.output_item.added"
        assert of_item[0]["item"]["status"] == "in_progress"
        text = "".join(event["delta"] for event in of_item if event["type"].endswith(".delta"))
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        assert {event["item_id"] for event in of_item if "item_id" in event} == {item["id"]}


async def test_items_become_messages(client: httpx.AsyncClient, service: Service, template: Template) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}", "id": "fc"},
        {"type": "function_call_output", "call_id": "c1", "output": "Sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "Rain"}]},
        {"type": "message", "role": "assistant", "content": [
            {"type": "output_text", "text": "So.", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    assert (await ask(client, service, input=items, instructions="Speak.")).status_code == 200
    messages = template.given["messages"]
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "Speak."),
        ("developer", "Be brief."),
        ("user", "Weather?"),
        ("assistant", ""),
        ("tool", "Sunny"),
        ("tool", "Rain"),
        ("assistant", "So."),
        ("user", "And?"),
    ]
    assert messages[3]["reasoning_content"] == "T"
    assert [call["id"] for call in messages[3]["tool_calls"]] == ["c1", "c2"]


async def test_continuation(client: httpx.AsyncClient, service: Service, template: Template) -> None:
    first = (await ask(client, service, input="One", instructions="Speak.")).json()
    second = (await ask(client, service, input="Two", previous_response_id=first["id"])).json()
    assert [m["content"] for m in template.given["messages"]] == ["One", ANSWER, "Two"]
    assert second["previous_response_id"] == first["id"]
    path = f"{RESPONSES}/{second['id']}"
    assert (await client.get(path)).json() == second
    items = (await client.get(f"{path}/input_items")).json()
    assert [item["content"] for item in items["data"]] == ["Two"]
    check_error(await client.post(f"{path}/cancel"), 400, "invalid_value")
    assert (await client.delete(path)).json() == {"id": second["id"], "object": "response", "deleted": True}
    check_error(await client.get(path), 404, "response_not_found")
    gone = await ask(client, service, input="Three", previous_response_id=second["id"])
    assert check_error(gone, 404, "response_not_found")["param"] == "previous_response_id"
    kept = (await ask(client, service, input="x", store=False)).json()
    check_error(await client.get(f"{RESPONSES}/{kept['id']}"), 404)


async def test_error_in_a_stream(client: httpx.AsyncClient, service: Service, engine: FakeEngine) -> None:
    engine.fail_at = 3
    events = read_events((await ask(client, service, input="Hi", stream=True)).text)
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1]["response"]["status"] == "failed"
    assert "secret" not in json.dumps(events)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "image", "role": "user", "content": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": ""}]}, "input[0].call_id"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "conversation": "c"}, "conversation"),
        ({"input": "x", "nonsense": 1}, "nonsense"),
        ({"input": "x" * 5000}, "input"),
        ({"input": "x", "model": "gpt-5"}, "model"),
        ({"input": "x", "previous_response_id": ""}, "previous_response_id"),
    ],
)
async def test_refusals_name_the_field(
    client: httpx.AsyncClient, service: Service, engine: FakeEngine, body: dict[str, Any], param: str
) -> None:
    response = await ask(client, service, **body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param
    assert not engine.submitted


async def test_openai_client(service: Service, engine: FakeEngine) -> None:
    await service.start()
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(App(Models.of(service))))
    client = openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=http_client)
    answer = await client.responses.create(model="default", input="Hi")
    assert answer.output_text == ANSWER
    async with client.responses.stream(model="default", input="Hi") as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(deltas) == final.output_text == ANSWER
    engine.answer = list(CALLS.encode())
    called = await client.responses.create(model="default", input="Hi", tools=[TOOL])
    call = called.output[1]
    assert call.type == "function_call"
    again = await client.responses.create(
        model="default",
        previous_response_id=called.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}],
    )
    assert again.status == "completed"


class TestStore:
    def stored(self, name: str, size: int) -> StoredResponse:
        return StoredResponse({"id": name}, [], [], size)

    def test_bounds(self) -> None:
        store = ResponseStore(max_tenant_bytes=30, max_bytes=50)
        for name in "abc":
            store.add("alice", self.stored(name, 10))
        assert store.get("alice", "a")
        store.add("alice", self.stored("d", 10))
        assert [name for name in "abcd" if store.get("alice", name)] == ["a", "c", "d"]
        store.add("bob", self.stored("e", 25))
        assert store.num_bytes <= 50
        assert store.get("bob", "e")
        store.add("bob", self.stored("huge", 31))
        assert store.get("bob", "huge") is None

    def test_keys_do_not_see_each_other(self) -> None:
        store = ResponseStore()
        store.add("alice", self.stored("a", 10))
        assert store.get("bob", "a") is None
        assert not store.delete("bob", "a")
        assert store.get("alice", "a")
        assert store.delete("alice", "a")
        assert store.num_bytes == 0
