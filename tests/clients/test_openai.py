"""openai-python against a live server: what the fake engine cannot show."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

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
