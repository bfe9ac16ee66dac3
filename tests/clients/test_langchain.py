"""langchain-openai against a live server."""

from __future__ import annotations

import functools
import operator
from typing import Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


@pytest.fixture
def chat(base_url: str) -> ChatOpenAI:
    return ChatOpenAI(
        model="default",
        base_url=f"{base_url}/v1",
        api_key="none",
        temperature=0,
        max_tokens=24,
        max_retries=0,
    )


def test_chat_and_its_stream(chat: ChatOpenAI) -> None:
    answer = chat.invoke("What is the capital of France?")
    assert "Paris" in str(answer.content)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    streamed = "".join(str(chunk.content) for chunk in chat.stream("What is the capital of France?"))
    assert streamed == answer.content


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def test_tool_round_trip(chat: ChatOpenAI) -> None:
    chat.max_tokens = 160
    calls = chat.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False, strict=True)
    asked = [HumanMessage("What is the weather in Paris?")]
    answer = calls.invoke(asked)
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [
        ("get_weather", {"city": "Paris"})
    ]
    streamed = functools.reduce(operator.add, calls.stream(asked))
    assert [call["args"] for call in streamed.tool_calls] == [{"city": "Paris"}]
    results = [
        ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"]) for call in answer.tool_calls
    ]
    assert chat.invoke([*asked, answer, *results]).content


class City(BaseModel):
    name: Literal["Paris", "Rome"]
    is_large: bool


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: Literal["json_schema", "function_calling"]) -> None:
    chat.max_tokens = 160
    city = chat.with_structured_output(City, method=method, strict=True).invoke(
        "What is the capital of France?"
    )
    assert isinstance(city, City)


def test_embeddings(base_url: str) -> None:
    embeddings = OpenAIEmbeddings(
        model="default", base_url=f"{base_url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    (vector,) = embeddings.embed_documents(["red"])
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
