"""The openai package, as users call it."""

from __future__ import annotations

import httpx
import openai
import pytest

from jinn.server.app import App
from jinn.server.config import ServerConfig

from .fakes import ANSWER, FakeEngine

KEY = "sk-test"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(api_key=KEY)


@pytest.fixture
def openai_client(app: App) -> openai.AsyncOpenAI:
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    return openai.AsyncOpenAI(api_key=KEY, base_url="http://test/v1", http_client=http_client, max_retries=0)


async def test_chat(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.chat.completions.create(
        model="default",
        messages=MESSAGES,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        user="u",
        metadata={"a": "b"},
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert bytes(answer.choices[0].logprobs.content[0].top_logprobs[1].bytes or []) == b"Q"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer._request_id is not None
    again = [*MESSAGES, answer.choices[0].message.model_dump(), *MESSAGES]
    assert (await openai_client.chat.completions.create(model="default", messages=again)).choices


async def test_chat_stream(openai_client: openai.AsyncOpenAI) -> None:
    stream = await openai_client.chat.completions.create(
        model="default", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ANSWER.encode()) + 1


async def test_stream_helper(openai_client: openai.AsyncOpenAI) -> None:
    async with openai_client.chat.completions.stream(model="default", messages=MESSAGES) as stream:
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        final = await stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == ANSWER
    assert final.choices[0].finish_reason == "stop"


async def test_completion(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.completions.create(model="default", prompt="x", max_tokens=5, logprobs=2)
    assert answer.choices[0].text == "Paris"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == list("Paris")
    stream = await openai_client.completions.create(model="default", prompt="x", max_tokens=5, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Paris"


async def test_models(openai_client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in openai_client.models.list()] == ["tiny.gguf"]
    assert (await openai_client.models.retrieve("default")).id == "tiny.gguf"


async def test_errors(openai_client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    create = openai_client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model="default", messages=MESSAGES, functions=[{"name": "f"}])
    assert (bad.value.param, bad.value.code) == ("functions", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="gpt-4o", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await openai_client.with_options(api_key="no").models.list()
    engine.fail_at = 3
    stream = await create(model="default", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="x-request-id"):
        [chunk async for chunk in stream]
    engine.is_alive = False
    with pytest.raises(openai.InternalServerError) as down:
        await create(model="default", messages=MESSAGES)
    assert down.value.status_code == 503
