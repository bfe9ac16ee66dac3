"""Tools and thoughts in chat completions, on a model that answers what the test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
import openai
import pytest

from jinn.engine.messages import ThinkingBudget
from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models
from jinn.server.responses import ChatCompletion, ChatCompletionChunk
from jinn.server.service import Service
from jinn.text.chat_format import ChatFormat
from jinn.text.reasoning import ReasoningFormat
from jinn.text.tokenizer import AddedToken, TokenKind
from jinn.text.tools import TOOL_FORMATS

from .conftest import chat_body
from .fakes import ByteTokenizer, FakeEngine
from .test_app import CHAT, check_error

THINK = ReasoningFormat("<think>", "</think>", "\n</think>")
HYBRID = ChatFormat(
    THINK, TOOL_FORMATS["hermes"], "enable_thinking", frozenset({"tools", "enable_thinking", "tone"})
)
ALWAYS = ChatFormat(THINK, TOOL_FORMATS["hermes"], None, frozenset({"tools"}))
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
)
START_ID, END_ID = 257, 258


class ThinkingTokenizer(ByteTokenizer):
    """Bytes, and a token for each tag of thoughts."""

    added_tokens = {  # noqa: RUF012
        "<think>": AddedToken(START_ID, TokenKind.USER_DEFINED),
        "</think>": AddedToken(END_ID, TokenKind.USER_DEFINED),
    }

    def encode(self, text: str, **options: Any) -> list[int]:
        before, tag, after = text.partition("</think>")
        return [*before.encode(), *([END_ID] if tag else []), *after.encode()]


class Template:
    """Writes the conversation plainly, and keeps what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.ending = ""

    def __call__(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        self.given = {"messages": messages, **variables}
        return list(("".join(str(message.get("content")) for message in messages) + self.ending).encode())


@pytest.fixture
def template() -> Template:
    return Template()


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(allowed_hosts=("test",))


@pytest.fixture
def chat_format() -> ChatFormat:
    return HYBRID


@pytest.fixture
def service(
    engine: FakeEngine, config: ServerConfig, template: Template, chat_format: ChatFormat
) -> Iterator[Service]:
    service = Service(
        config, engine, ThinkingTokenizer(), template, file_name="tiny.gguf", chat_format=chat_format
    )
    asyncio.run(service.start())
    yield service
    asyncio.run(service.close())


@pytest.fixture
def openai_client(app: App) -> openai.AsyncOpenAI:
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    return openai.AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=http_client, max_retries=0)


def says(engine: FakeEngine, text: str) -> None:
    engine.answer = list(text.encode())


async def answer(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json=chat_body(**fields))
    assert response.status_code == 200, response.text
    ChatCompletion.model_validate_json(response.text)
    body: dict[str, Any] = response.json()
    return body


async def chunks(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    response = await client.post(CHAT, json=chat_body(stream=True, **fields))
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    for event in events:
        ChatCompletionChunk.model_validate_json(event)
    return [json.loads(event)["choices"][0] for event in events]


async def test_calls(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    says(engine, CALLS)
    body = await answer(client, tools=[WEATHER])
    choice = body["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    functions = [call["function"] for call in choice["message"]["tool_calls"]]
    assert functions == [
        {"name": "weather", "arguments": '{"city": "Paris"}'},
        {"name": "weather", "arguments": '{"city": "Köln"}'},
    ]
    ids = {call["id"] for call in choice["message"]["tool_calls"]}
    assert len(ids) == 2


async def test_content_is_null_beside_calls_alone(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    says(engine, CALLS.removeprefix("I look."))
    assert (await answer(client, tools=[WEATHER]))["choices"][0]["message"]["content"] is None


async def test_streamed_calls(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """Index in every delta; id, type and name once, before any argument."""
    says(engine, CALLS)
    received = await chunks(client, tools=[WEATHER])
    deltas = [call for choice in received for call in choice["delta"].get("tool_calls", ())]
    assert {delta["index"] for delta in deltas} == {0, 1}
    for index in (0, 1):
        first, *others = (delta for delta in deltas if delta["index"] == index)
        assert first == {
            "index": index,
            "id": first["id"],
            "type": "function",
            "function": {"name": "weather", "arguments": ""},
        }
        assert all(delta.keys() == {"index", "function"} for delta in others)
        assert all(delta["function"].keys() == {"arguments"} for delta in others)
        assert len(others) > 5
    assert received[-1]["finish_reason"] == "tool_calls"


async def test_a_cut_call_ends_for_its_length(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    says(engine, CALLS)
    choice = (await answer(client, tools=[WEATHER], max_tokens=CALLS.index("Paris") + 1))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "P'


async def test_one_call_at_most(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    says(engine, CALLS)
    body = await answer(client, tools=[WEATHER], parallel_tool_calls=False)
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "Paris"}'
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert body["usage"]["completion_tokens"] < len(CALLS) / 2 + 30
    assert engine.aborted
    assert not engine.running


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}])
async def test_without_tools_the_text_stays(
    client: httpx.AsyncClient, engine: FakeEngine, template: Template, fields: dict[str, Any]
) -> None:
    says(engine, CALLS)
    choice = (await answer(client, **fields))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALLS, "stop")
    assert "tool_calls" not in choice["message"]
    assert template.given["tools"] is None


async def test_thoughts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    says(engine, "<think>\nHm.\n</think>\n\nParis")
    body = await answer(client)
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Paris")
    assert "reasoning" not in message
    details = body["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == len("<think>\nHm.\n</think>")
    deltas = [choice["delta"] for choice in await chunks(client)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Paris"


async def test_thoughts_that_the_prompt_begins(
    client: httpx.AsyncClient, engine: FakeEngine, template: Template
) -> None:
    template.ending = "<think>\n"
    says(engine, "Hm.\n</think>\n\nParis")
    message = (await answer(client))["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Paris")
    choice = (await answer(client, max_tokens=2))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "length")


async def test_every_token_keeps_its_logprob(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    text = f"<think>\nHm.\n</think>\n\n{CALLS}"
    says(engine, text)
    whole = (await answer(client, tools=[WEATHER], logprobs=True))["choices"][0]["logprobs"]["content"]
    streamed = [
        entry
        for choice in await chunks(client, tools=[WEATHER], logprobs=True)
        for entry in (choice["logprobs"] or {"content": ()})["content"]
    ]
    assert streamed == whole
    assert len(whole) == len(text.encode())


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("reasoning", {"reasoning"}),
        ("reasoning_content", {"reasoning_content"}),
        ("both", {"reasoning", "reasoning_content"}),
    ],
)
async def test_the_name_of_thoughts_is_a_setting(field: Any, names: set[str], engine: FakeEngine) -> None:
    config = ServerConfig(reasoning_field=field, allowed_hosts=("test",))
    service = Service(config, engine, ThinkingTokenizer(), Template(), file_name="x", chat_format=HYBRID)
    await service.start()
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(App(Models.of(service))), base_url="http://test"
    ) as client:
        says(engine, "<think>Hm.</think>Paris")
        message = (await answer(client))["choices"][0]["message"]
        assert names == message.keys() & {"reasoning", "reasoning_content"}
        streamed = {name for choice in await chunks(client) for name in choice["delta"]}
        assert streamed == {"role", "content", "refusal", *names}


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({}, {}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": {"thinking": True}, "enable_thinking": True}, {"enable_thinking": True}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "high"}, {"enable_thinking": True}),
        ({"chat_template_kwargs": {"tone": "dry", "enable_thinking": None}}, {"tone": "dry"}),
    ],
)
async def test_what_the_template_is_told(
    client: httpx.AsyncClient, template: Template, fields: dict[str, Any], variables: dict[str, Any]
) -> None:
    await answer(client, **fields)
    own = {"messages", "tools", "add_generation_prompt", "continue_final_message"}
    assert {name: value for name, value in template.given.items() if name not in own} == variables


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"enable_thinking": True, "reasoning_effort": "none"}, "reasoning_effort"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs.enable_thinking",
        ),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"unread": 1}}, "chat_template_kwargs.unread"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
    ],
)
async def test_contradictions_are_named(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    error = check_error(await client.post(CHAT, json=chat_body(**fields)), 400)
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    ("fields", "ending", "budget"),
    [
        ({}, "", None),
        ({"thinking_budget": 7}, "", (7, START_ID)),
        ({"thinking_budget": 7}, "<think>\n", (7, None)),
        ({"thinking_budget": 7, "reasoning_effort": "low"}, "", (7, START_ID)),
        ({"reasoning_effort": "low"}, "", (1024, START_ID)),
        ({"reasoning_effort": "high"}, "", None),
        ({"reasoning_effort": "none"}, "", None),
        ({"enable_thinking": False, "thinking_budget": 7}, "", None),
    ],
)
async def test_budgets(
    client: httpx.AsyncClient,
    engine: FakeEngine,
    template: Template,
    fields: dict[str, Any],
    ending: str,
    budget: tuple[int, int | None] | None,
) -> None:
    template.ending = ending
    await answer(client, **fields)
    expected = budget and ThinkingBudget(*budget, END_ID, (10, END_ID))
    assert engine.submitted[-1].sampling.thinking_budget == expected


@pytest.mark.parametrize("chat_format", [ALWAYS])
async def test_a_model_that_always_thinks_is_cut_short(
    client: httpx.AsyncClient, engine: FakeEngine, template: Template
) -> None:
    template.ending = "<think>\n"
    await answer(client, enable_thinking=False)
    assert engine.submitted[-1].sampling.thinking_budget == ThinkingBudget(0, None, END_ID, (10, END_ID))
    assert "enable_thinking" not in template.given


@pytest.mark.parametrize("chat_format", [ChatFormat()])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),
        ({"enable_thinking": True}, "enable_thinking"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"thinking_budget": 5}, "thinking_budget"),
    ],
)
async def test_a_model_without_either_says_so(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    assert check_error(await client.post(CHAT, json=chat_body(**fields)), 400)["param"] == param
    await answer(client, enable_thinking=False, reasoning_effort="none", tools=[])


async def test_continued_thoughts(client: httpx.AsyncClient, engine: FakeEngine, template: Template) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nLet me"}]
    says(engine, " see.\n</think>\n\nParis")
    body = await answer(client, messages=messages, continue_final_message=True)
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (" see.", "Paris")
    assert template.given["continue_final_message"] is True


async def test_openai_tool_round_trip(
    openai_client: openai.AsyncOpenAI, engine: FakeEngine, template: Template
) -> None:
    create = openai_client.chat.completions.create
    messages: list[Any] = [{"role": "user", "content": "Weather in Paris and Köln?"}]
    says(engine, CALLS)
    first = (await create(model="default", messages=messages, tools=[WEATHER])).choices[0].message
    assert first.tool_calls is not None
    messages.append(first)
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in reversed(first.tool_calls)
    ]
    says(engine, "Sunny in both.")
    second = await create(model="default", messages=messages, tools=[WEATHER])
    assert second.choices[0].message.content == "Sunny in both."
    roles = [message["role"] for message in template.given["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]
    calls = template.given["messages"][1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ['{"city": "Paris"}', '{"city": "Köln"}']


async def test_openai_stream_helper(openai_client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    says(engine, f"<think>Hm.</think>{CALLS}")
    async with openai_client.chat.completions.stream(
        model="default", messages=[{"role": "user", "content": "Hi"}], tools=[WEATHER]
    ) as stream:
        done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = await stream.get_final_completion()
    message = final.choices[0].message
    assert [event.arguments for event in done] == ['{"city": "Paris"}', '{"city": "Köln"}']
    assert (message.content, message.reasoning_content) == ("I look.", "Hm.")  # type: ignore[attr-defined]
    assert message.tool_calls is not None
    assert [call.function.name for call in message.tool_calls] == ["weather", "weather"]
    assert final.choices[0].finish_reason == "tool_calls"
    again = [{"role": "user", "content": "Hi"}, message.model_dump()]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "x"} for call in message.tool_calls]
    await openai_client.chat.completions.create(model="default", messages=[*again, *results])  # type: ignore[list-item]


async def forced(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post(CHAT, json=chat_body(tools=[WEATHER], **fields))


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_may_be_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine, tool_choice: Any
) -> None:
    assert (await forced(client, tool_choice=tool_choice)).status_code == 200
    grammar = engine.submitted[0].grammar
    assert grammar is not None
    assert "weather" in grammar.text
    assert (")*" in grammar.text) == (tool_choice == "required")
    assert grammar.after_id == END_ID


async def test_one_call_may_be_asked_for(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await forced(client, tool_choice="required", parallel_tool_calls=False)
    grammar = engine.submitted[0].grammar
    assert grammar is not None
    assert ")*" not in grammar.text


async def test_what_does_not_go_with_a_call_that_is_asked_for(client: httpx.AsyncClient) -> None:
    response = await forced(client, tool_choice="required", response_format={"type": "json_object"})
    assert check_error(response, 400)["param"] == "response_format"
    function = {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}
    body = chat_body(tools=[{"type": "function", "function": function}], tool_choice="required")
    error = check_error(await client.post(CHAT, json=body), 400)
    assert error["param"] == "tools#/f/properties/a/not"


STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}


async def test_strict_tools_may_be_called(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    says(engine, CALLS)
    message = (await answer(client, tools=[STRICT]))["choices"][0]["message"]
    assert (message["content"], len(message["tool_calls"])) == ("I look.", 2)
    assert engine.submitted[-1].grammar is not None
    assert "(?s:" in engine.submitted[-1].grammar.text
    for fields in ({"tools": [WEATHER]}, {"tools": [STRICT], "tool_choice": "none"}):
        await answer(client, **fields)
        assert engine.submitted[-1].grammar is None
    response = await client.post(CHAT, json=chat_body(tools=[STRICT], stop="."))
    assert check_error(response, 400)["param"] == "stop"


@pytest.mark.parametrize(
    ("text", "content", "num_calls"),
    [
        (CALLS.removeprefix("I look.\n"), None, 2),
        (json.dumps({"a": CALLS}), json.dumps({"a": CALLS}), 0),
        (f"<think>\nHm.\n</think>\n\n{json.dumps({'a': CALLS})}", json.dumps({"a": CALLS}), 0),
    ],
)
async def test_an_answer_is_a_call_or_as_asked_for(
    client: httpx.AsyncClient, engine: FakeEngine, text: str, content: str | None, num_calls: int
) -> None:
    says(engine, text)
    fields: dict[str, Any] = {"tools": [WEATHER], "response_format": {"type": "json_object"}}
    message = (await answer(client, **fields, max_tokens=900))["choices"][0]["message"]
    assert (message["content"], len(message.get("tool_calls", []))) == (content, num_calls)
    grammar = engine.submitted[-1].grammar
    assert grammar is not None
    assert "@content |" in grammar.text


async def test_a_bad_schema_beside_tools_is_named(client: httpx.AsyncClient) -> None:
    named = {"name": "a", "schema": {"not": {}}}
    response_format = {"type": "json_schema", "json_schema": named}
    response = await forced(client, response_format=response_format)
    assert check_error(response, 400)["param"] == "response_format.json_schema.schema#/not"
    strict = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
    response = await client.post(CHAT, json=chat_body(tools=[strict]))
    assert check_error(response, 400)["param"] == "tools#/f/not"


class TestDeepSeek:
    """Whose calls are written with control tokens."""

    @pytest.fixture
    def chat_format(self) -> ChatFormat:
        return ChatFormat(None, TOOL_FORMATS["deepseek_v31"], None, frozenset({"tools"}))

    async def test_calls_may_be_asked_for(
        self, client: httpx.AsyncClient, service: Service, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opening = TOOL_FORMATS["deepseek_v31"].control_texts[0]
        assert (await forced(client, tool_choice="required")).status_code == 200
        monkeypatch.setattr(
            service.tokenizer, "added_tokens", {opening: AddedToken(259, TokenKind.CONTROL)}, raising=False
        )
        monkeypatch.setattr(service.tokenizer, "special_ids", frozenset({259}), raising=False)
        assert (await forced(client, tool_choice="required")).status_code == 200
        spelled, named = [
            json.loads(submit.grammar.text)["grammars"][0]["lark_grammar"]
            for submit in engine.submitted
            if submit.grammar is not None
        ]
        assert f'start: "{opening}' in spelled
        assert f"start: {opening}" in named
