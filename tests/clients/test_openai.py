"""openai-python against a live server: what the fake engine cannot show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="none", base_url=f"{base_url}/v1", max_retries=0) as client:
        yield client


def test_chat_and_its_stream(client: openai.OpenAI) -> None:
    body = {"model": "default", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**body).choices[0].message.content
    assert "Paris" in (whole or "")
    with client.chat.completions.stream(**body) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == whole


def test_responses_continue(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="default", input="What is the capital of France?", temperature=0, max_output_tokens=24
    )
    assert "Paris" in first.output_text
    second = client.responses.create(
        model="default", input="And of Italy?", previous_response_id=first.id, max_output_tokens=8
    )
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 0
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)


def test_embeddings(client: openai.OpenAI) -> None:
    data = client.embeddings.create(model="default", input=["a red rose", "a red flower", "tax law"]).data
    rose, flower, law = (entry.embedding for entry in data)

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert cosine(rose, rose) == pytest.approx(1, abs=1e-5)
    assert cosine(rose, flower) > cosine(rose, law)


def test_echoed_logprobs_are_those_of_generation(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="default", prompt="One, two,", max_tokens=5, temperature=0, logprobs=1
    ).choices[0]
    echoed = client.completions.create(
        model="default", prompt="One, two," + answer.text, max_tokens=1, echo=True, logprobs=1
    ).choices[0]
    assert answer.logprobs is not None
    assert echoed.logprobs is not None
    assert echoed.logprobs.token_logprobs is not None
    assert echoed.logprobs.token_logprobs[-6:-1] == answer.logprobs.token_logprobs


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_tool_round_trip(client: openai.OpenAI, choice: str) -> None:
    """Asked for a call the model must; told to copy one it does, and strictly."""
    text = f"Copy this:\n{CALL}" if choice == "auto" else "What is the weather in Paris?"
    messages: list[Any] = [{"role": "user", "content": text}]
    body: Any = {"model": "default", "tools": [WEATHER], "temperature": 0, "max_tokens": 160}
    body["parallel_tool_calls"] = False  # it would not stop calling
    with client.chat.completions.stream(**body, messages=messages, tool_choice=choice) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls
    assert [event.arguments for event in done] == [call.function.arguments for call in message.tool_calls]
    assert {call.function.parsed_arguments["city"] for call in message.tool_calls} == {"Paris"}
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
        for call in message.tool_calls
    ]
    messages += [message.model_dump(exclude_none=True), *results]
    answer = client.chat.completions.create(**body, messages=messages, tool_choice="none").choices[0].message
    assert answer.content
    assert not answer.tool_calls


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    is_large: bool


def test_parse(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="default", messages=QUESTION, temperature=0, max_tokens=64, response_format=City
    )
    assert isinstance(answer.choices[0].message.parsed, City)
    with_tools = client.chat.completions.parse(
        model="default",
        messages=QUESTION,
        temperature=0,
        max_tokens=160,
        response_format=City,
        tools=[WEATHER],
        parallel_tool_calls=False,
    )
    message = with_tools.choices[0].message
    assert isinstance(message.parsed, City) or message.tool_calls


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


def test_schema_holds_in_every_api(client: openai.OpenAI) -> None:
    """Also where the prompt asks for something else."""
    named = {"name": "answer", "schema": SCHEMA, "strict": True}
    chat = client.chat.completions.create(
        model="default",
        messages=QUESTION,
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": named},
    )
    response = client.responses.create(
        model="default",
        input="What is the capital of France?",
        max_output_tokens=64,
        temperature=0,
        text={"format": {"type": "json_schema", **named}},
    )
    message = client.post(
        "/messages",
        cast_to=dict,
        body={
            "messages": QUESTION,
            "max_tokens": 64,
            "temperature": 0,
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        },
    )
    texts = [chat.choices[0].message.content, response.output_text, message["content"][0]["text"]]
    assert {json.loads(text or "")["colour"] for text in texts} <= {"red", "green"}


def test_bad_schema_is_named_in_each_apis_own_words(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(
            model="default",
            input="x",
            text={"format": {"type": "json_schema", "name": "a", "schema": {"type": "objekt"}}},
        )
    assert str(refused.value.param).startswith("text.format.schema")
