"""langchain-openai against a live server."""

from __future__ import annotations

import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings


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


def test_embeddings(base_url: str) -> None:
    embeddings = OpenAIEmbeddings(
        model="default", base_url=f"{base_url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    (vector,) = embeddings.embed_documents(["red"])
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
