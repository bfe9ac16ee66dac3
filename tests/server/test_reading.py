"""The APIs that read texts: tokenize, embeddings, rerank and score."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from jinn.engine.messages import Pooling
from jinn.server import responses
from jinn.server.app import App
from jinn.server.service import Service

from .conftest import chat_body
from .fakes import EOS, FakeEngine

EMBEDDINGS, RERANK, SCORE = "/v1/embeddings", "/v1/rerank", "/v1/score"


def counts(text: str) -> np.ndarray:
    """What the fake engine gives, scaled to length 1."""
    vector = np.array([sum(byte % 8 == i for byte in text.encode()) for i in range(8)], np.float64)
    return vector / np.linalg.norm(vector)


async def test_tokenize(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "Hé", "return_token_strs": True})).json()
    responses.Tokens.model_validate(answer)
    assert answer["tokens"] == list("Hé".encode())
    assert (answer["count"], answer["max_model_len"]) == (3, 4096)
    assert answer["token_strs"] == ["H", "bytes:\\xc3", "bytes:\\xa9"]
    back = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert back == {"prompt": "Hé"}


async def test_tokenizer_info(client: httpx.AsyncClient) -> None:
    answer = (await client.get("/tokenizer_info")).json()
    responses.TokenizerInfo.model_validate(answer)
    assert answer == {"bos_token": None, "eos_token": "."}


async def test_tokenize_of_a_conversation(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json=chat_body())).json()
    assert bytes(answer["tokens"]) == b"user:Hello\n"
    assert answer["token_strs"] is None


async def test_names_of_a_conversations_tokens(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json=chat_body(return_token_strs=True))).json()
    assert "".join(answer["token_strs"]) == "user:Hello\n"
    assert (await client.post("/tokenize", json=chat_body(return_token_strs=None))).status_code == 200
    response = await client.post("/tokenize", json={**chat_body(), "return_token_strs": "no"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "return_token_strs"


async def test_embeddings(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"input": ["abc", "x"], "encoding_format": "float"}
    answer = (await client.post(EMBEDDINGS, json=body)).json()
    responses.EmbeddingList.model_validate(answer)
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    for text, entry in zip(body["input"], answer["data"], strict=True):
        np.testing.assert_allclose(entry["embedding"], counts(text), atol=1e-7)
    assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert {score.pooling for score in engine.scored} == {Pooling.MEAN}
    packed = (await client.post(EMBEDDINGS, json={**body, "encoding_format": "base64"})).json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == answer["data"][0]["embedding"]
    short = (await client.post(EMBEDDINGS, json={**body, "dimensions": 3})).json()["data"][0]["embedding"]
    np.testing.assert_allclose(short, counts("abc")[:3] / np.linalg.norm(counts("abc")[:3]), atol=1e-7)


async def test_embeddings_by_the_last_token_end_as_the_tokenizer_says(
    client: httpx.AsyncClient, service: Service, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.pooling = Pooling.LAST
    monkeypatch.setattr(service.tokenizer, "suffix_ids", (EOS,), raising=False)
    await client.post(EMBEDDINGS, json={"input": "a"})
    (score,) = engine.scored
    assert (score.token_ids, score.pooling) == ((97, EOS), Pooling.LAST)


async def test_openai_client(app: App) -> None:
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    client = openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=http_client)
    answer = await client.embeddings.create(model="default", input="abc")
    np.testing.assert_allclose(answer.data[0].embedding, counts("abc"), atol=1e-7)


async def test_rerank(client: httpx.AsyncClient) -> None:
    body = {"query": "abc", "documents": ["xyz", {"text": "abcd"}, "abc"], "top_n": 2}
    answer = (await client.post(RERANK, json={**body, "return_documents": True})).json()
    responses.Reranking.model_validate(answer)
    assert [result["index"] for result in answer["results"]] == [2, 1]
    assert answer["results"][0]["relevance_score"] == pytest.approx(1.0)
    assert answer["results"][1]["document"] == {"text": "abcd"}
    assert answer["usage"]["prompt_tokens"] == 13


async def test_score(client: httpx.AsyncClient) -> None:
    answer = (await client.post(SCORE, json={"text_1": "abc", "text_2": ["abc", "xyz"]})).json()
    responses.ScoreList.model_validate(answer)
    expected = [1.0, float(counts("abc") @ counts("xyz"))]
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected)
    pairs = (await client.post(SCORE, json={"text_1": ["a", "b"], "text_2": ["b", "b"]})).json()
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, "prompt"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        (EMBEDDINGS, {"input": [65]}, "input"),
        (EMBEDDINGS, {"input": [[65]]}, "input"),
        (EMBEDDINGS, {"input": []}, "input"),
        (EMBEDDINGS, {"input": ["a", ""]}, "input[1]"),
        (EMBEDDINGS, {"input": "x" * 5000}, "input[0]"),
        (EMBEDDINGS, {"input": ["x"] * 2049}, "input"),
        (EMBEDDINGS, {"input": "x", "dimensions": 0}, "dimensions"),
        (EMBEDDINGS, {"input": "x", "encoding_format": "hex"}, "encoding_format"),
        (RERANK, {"query": "", "documents": ["x"]}, "query"),
        (RERANK, {"query": "x", "documents": []}, "documents"),
        (RERANK, {"query": "x", "documents": [{"image": "x"}]}, "documents[0]"),
        (RERANK, {"query": "x", "documents": ["x"], "top_n": 0}, "top_n"),
        (SCORE, {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1"),
        (SCORE, {"text_1": "a"}, "text_2"),
    ],
)
async def test_refusals_name_the_field(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any], param: str
) -> None:
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not engine.scored


async def test_more_dimensions_than_there_are(client: httpx.AsyncClient) -> None:
    response = await client.post(EMBEDDINGS, json={"input": "x", "dimensions": 9})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "dimensions")


async def test_client_that_leaves(app: App, engine: FakeEngine, service: Service) -> None:
    engine.prefill_seconds = 10
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    request = asyncio.create_task(http.post(EMBEDDINGS, json={"input": ["a", "b"]}))
    while len(engine.scored) < 2:
        await asyncio.sleep(0.01)
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    assert len(engine.aborted) == 2
    assert not service._running
