"""What comes over the wire for good requests, streamed and whole."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from jinn.server import generation, responses
from jinn.server.config import ServerConfig
from jinn.server.service import Service

from .conftest import chat_body
from .fakes import ANSWER, FakeEngine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


async def events(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], chunk: type[BaseModel]
) -> list[Any]:
    """The chunks of a stream, each checked against its documented shape."""
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-accel-buffering"] == "no"
    *data, last, empty = response.text.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in data)
    chunks = [json.loads(event.removeprefix("data: ")) for event in data]
    for fields in chunks:
        chunk.model_validate(fields)
    return chunks


async def test_chat(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json=chat_body(seed=7))
    answer = response.json()
    responses.ChatCompletion.model_validate(answer)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny/model"
    assert answer["system_fingerprint"] == "fp_fake"
    assert answer["seed"] == 7
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt, num_answer = len("user:Hello\n"), len(ANSWER.encode()) + 1
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == num_answer
    assert answer["usage"]["total_tokens"] == num_prompt + num_answer
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3


async def test_chat_stream(client: httpx.AsyncClient) -> None:
    chunks = await events(client, CHAT, chat_body(seed=7), responses.ChatCompletionChunk)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[:-1]) == ANSWER
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1]["seed"] == 7
    assert not any("usage" in chunk for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("path", "body", "chunk"),
    [
        (CHAT, chat_body(), responses.ChatCompletionChunk),
        (COMPLETIONS, {"prompt": "x"}, responses.CompletionChunk),
    ],
)
async def test_stream_usage(client: httpx.AsyncClient, path: str, body: dict[str, Any], chunk: Any) -> None:
    whole = (await client.post(path, json=body)).json()
    chunks = await events(client, path, {**body, "stream_options": {"include_usage": True}}, chunk)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]


async def test_chat_stream_folds_to_the_whole(client: httpx.AsyncClient) -> None:
    body = chat_body(n=3, logprobs=True, top_logprobs=2, stop=["Seine"], seed=1)
    whole = (await client.post(CHAT, json=body)).json()
    responses.ChatCompletion.model_validate(whole)
    for choice in whole["choices"]:
        parts = [
            chunk["choices"][0]
            for chunk in await events(client, CHAT, body, responses.ChatCompletionChunk)
            if chunk["choices"][0]["index"] == choice["index"]
        ]
        assert "".join(p["delta"].get("content", "") for p in parts) == choice["message"]["content"]
        assert choice["message"]["content"] == "Paris, and the "
        entries = [entry for p in parts if p["logprobs"] for entry in p["logprobs"]["content"]]
        assert entries == choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in entries) == "Paris, and the "
        assert (
            [p["finish_reason"] for p in parts if p["finish_reason"]] == [choice["finish_reason"]] == ["stop"]
        )


async def test_chat_logprobs(client: httpx.AsyncClient) -> None:
    answer = (await client.post(CHAT, json=chat_body(logprobs=True, max_tokens=1))).json()
    responses.ChatCompletion.model_validate(answer)
    assert answer["choices"][0]["logprobs"] == {
        "content": [{"token": "P", "logprob": -0.5, "bytes": [80], "top_logprobs": []}],
        "refusal": None,
    }


async def test_logprobs_of_half_a_character(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = list("é".encode())
    answer = (await client.post(CHAT, json=chat_body(logprobs=True))).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [(e["token"], e["bytes"]) for e in entries] == [("bytes:\\xc3", [0xC3]), ("bytes:\\xa9", [0xA9])]


async def test_completion(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 3, "logprobs": 1, "seed": 5}
    answer = (await client.post(COMPLETIONS, json=body)).json()
    responses.Completion.model_validate(answer)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["text"] for choice in answer["choices"]} == {"Par"}
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["P", "a", "r"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"P": -0.5}, {"a": -0.5}, {"r": -0.5}],
        "text_offset": [0, 1, 2],
    }
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 12)
    assert [submit.prompt_ids for submit in engine.submitted] == [(97, 98), (99,)]
    assert all(submit.sampling.n == 2 and submit.sampling.seed == 5 for submit in engine.submitted)


@pytest.mark.parametrize("prompt", ["Hi", [72, 105]])
async def test_echo(client: httpx.AsyncClient, prompt: Any) -> None:
    body = {"prompt": prompt, "echo": True, "max_tokens": 2, "n": 2}
    answer = (await client.post(COMPLETIONS, json=body)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["HiPa", "HiPa"]
    chunks = await events(client, COMPLETIONS, body, responses.CompletionChunk)
    assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == 1) == "HiPa"


@pytest.mark.parametrize("prompt", ["Hé", [72, 0xC3, 0xA9]])
async def test_echo_with_logprobs(client: httpx.AsyncClient, engine: FakeEngine, prompt: Any) -> None:
    body = {"prompt": prompt, "echo": True, "max_tokens": 2, "logprobs": 1, "n": 2}
    answer = (await client.post(COMPLETIONS, json=body)).json()
    responses.Completion.model_validate(answer)
    for choice in answer["choices"]:
        assert choice["text"] == "HéPa"
        assert choice["logprobs"] == {
            "tokens": ["H", "bytes:\\xc3", "bytes:\\xa9", "P", "a"],
            "token_logprobs": [None, -1.0, -1.0, -0.5, -0.5],
            "top_logprobs": [
                None,
                {"bytes:\\xc3": -1.0},
                {"bytes:\\xa9": -1.0},
                {"P": -0.5},
                {"a": -0.5},
            ],
            "text_offset": [0, 1, 1, 2, 3],
        }
    assert [score.num_logprobs for score in engine.scored] == [1]
    chunks = await events(client, COMPLETIONS, body, responses.CompletionChunk)
    parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == 1]
    assert "".join(part["text"] for part in parts) == "HéPa"
    assert [t for part in parts for t in part["logprobs"]["tokens"]] == choice["logprobs"]["tokens"]


async def test_echo_that_fails_has_a_true_status(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_at = 0
    for logprobs in (None, 1):
        body = {"prompt": "x", "echo": True, "logprobs": logprobs, "stream": True}
        assert (await client.post(COMPLETIONS, json=body)).status_code == 500


async def test_suffix_without_tokens_for_it(client: httpx.AsyncClient) -> None:
    for body, param in (
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": [65], "suffix": "y"}, "suffix"),
        ({"prompt": "x", "suffix": "y", "echo": True}, "suffix"),
    ):
        response = await client.post(COMPLETIONS, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert (await client.post(COMPLETIONS, json={"prompt": "x", "suffix": ""})).status_code == 200


async def test_stop_string_aborts_the_choice(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = chat_body(stop=["and"], ignore_eos=True, n=2)
    answer = (await client.post(CHAT, json=body)).json()
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"Paris, "}
    assert answer["usage"]["completion_tokens"] == 2 * len("Paris, and")
    assert sorted(abort.index for abort in engine.aborted) == [0, 1]
    assert not engine.running
    assert all(submit.sampling.stop == () for submit in engine.submitted)


async def test_long_text_is_encoded_beside_the_loop(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "x" * 20_000})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert not engine.submitted


async def test_ping_while_the_prompt_is_read(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "PING_SECONDS", 0.05)
    engine.prefill_seconds = 0.2
    response = await client.post(CHAT, json=chat_body(stream=True, max_tokens=2))
    pings = response.text.split("data: ")[0]
    assert pings.count(": ping\n\n") * len(": ping\n\n") == len(pings) > 0
    engine.step_seconds, engine.prefill_seconds = 0.12, 0.0
    response = await client.post(CHAT, json=chat_body(stream=True, max_tokens=4))
    assert ": ping" in response.text.split("data: ")[-4]  # also between late tokens
    engine.prefill_seconds = 0.2
    whole = await client.post(CHAT, json=chat_body(max_tokens=2))
    assert whole.json()["choices"][0]["message"]["content"] == "Pa"


async def test_ready_lines_split_only_at_line_feeds(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answer = list("a\u2028b\x85c\x0bd\u2029".encode())
    response = await client.post(CHAT, json=chat_body(stream=True))
    assert all(not line or line.startswith("data: ") for line in response.text.splitlines())


@pytest.mark.parametrize("name", ["tiny/model", "tiny.gguf", "tiny", "default"])
async def test_model_names(client: httpx.AsyncClient, name: str) -> None:
    response = await client.post(CHAT, json=chat_body(model=name, max_tokens=1))
    assert response.json()["model"] == "tiny/model"
    model = (await client.get(f"/v1/models/{name}")).json()
    responses.Model.model_validate(model)
    assert model["id"] == "tiny/model"
    listed = (await client.get("/v1/models")).json()
    responses.ModelList.model_validate(listed)
    assert listed["data"] == [model]


class TestTolerant:
    @pytest.fixture
    def config(self) -> ServerConfig:
        return ServerConfig(tolerate_unknown_fields=True, allowed_hosts=("test",))

    async def test_ignored_fields_are_named(self, client: httpx.AsyncClient) -> None:
        message = {"role": "user", "content": "x", "colour": 1}
        response = await client.post(CHAT, json={"messages": [message], "é": 1, "max_tokens": 1})
        assert response.status_code == 200
        assert response.headers["x-jinn-ignored"] == "\\xe9, messages[0].colour"


async def test_same_tenant_without_keys(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await asyncio.gather(*[client.post(CHAT, json=chat_body(max_tokens=1)) for _ in range(3)])
    assert {submit.tenant for submit in engine.submitted} == {"anonymous"}
    assert len({submit.request_id for submit in engine.submitted}) == 3


async def test_metrics(client: httpx.AsyncClient, service: Service) -> None:
    await client.post(CHAT, json=chat_body())
    await client.post(CHAT, json=chat_body(max_tokens=3, n=2))
    text = (await client.get("/metrics")).text
    label = '{model_name="tiny/model"}'
    tokens = len(ANSWER.encode()) + 1 + 6
    for line in (
        f"jinn:num_requests_running{label} 0.0",
        f"jinn:num_requests_waiting{label} 0.0",
        f"jinn:kv_cache_usage_perc{label} 0.0",
        f"jinn:prefix_cache_queries_total{label} 0.0",
        f"jinn:prefix_cache_hits_total{label} 0.0",
        f"jinn:prompt_tokens_total{label} 0.0",
        f"jinn:generation_tokens_total{label} {tokens}.0",
        'jinn:request_success_total{finished_reason="stop",model_name="tiny/model"} 1.0',
        'jinn:request_success_total{finished_reason="length",model_name="tiny/model"} 2.0',
        'jinn:request_success_total{finished_reason="abort",model_name="tiny/model"} 0.0',
        f"jinn:time_to_first_token_seconds_count{label} 2.0",
        f"jinn:inter_token_latency_seconds_count{label} {tokens - 3}.0",
        f"jinn:e2e_request_latency_seconds_count{label} 2.0",
        f"jinn:request_queue_time_seconds_count{label} 2.0",
        f"jinn:request_prefill_time_seconds_count{label} 2.0",
        f"jinn:request_decode_time_seconds_count{label} 2.0",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("path", "body", "chunk", "totals"),
    [
        (CHAT, chat_body(), responses.ChatCompletionChunk, [len("user:Hello\n")]),
        (COMPLETIONS, {"prompt": ["abcd", "abcdef"]}, responses.CompletionChunk, [4, 6]),
    ],
)
async def test_progress(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], chunk: type[BaseModel], totals: list[int]
) -> None:
    plain = await events(client, path, {**body, "seed": 1}, chunk)
    told = await events(client, path, {**body, "seed": 1, "return_progress": True}, chunk)
    progress = [fields.pop("prompt_progress") for fields in told if "prompt_progress" in fields]
    assert [(p["index"], p["total"], p["cache"], p["processed"]) for p in progress] == [
        (index, total, 3, 3) for index, total in enumerate(totals)
    ]
    assert all(0 <= p["time_ms"] < 60_000 for p in progress)
    assert not any(fields["choices"] for fields in told[: len(totals)])
    assert [fields["choices"] for fields in told[len(totals) :]] == [fields["choices"] for fields in plain]
