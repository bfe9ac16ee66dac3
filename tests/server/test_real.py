"""The packaged model behind `jinn serve`: the openai package, bad input, peak memory and start-up."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from .real import RealServer

pytest.importorskip("jinn._native")

MAX_MODEL_LEN = 2048
CACHE_MEMORY = 64 * 2**20
VOCAB_SIZE = 49152
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(smollm2_path: Path) -> Iterator[RealServer]:
    server = RealServer(
        str(smollm2_path), "--cache-memory", str(CACHE_MEMORY), "--max-model-len", str(MAX_MODEL_LEN)
    )
    try:
        yield server
    finally:
        assert server.stop() == 0


@pytest.fixture
def client(server: RealServer) -> Iterator[openai.OpenAI]:
    base_url = f"http://127.0.0.1:{server.port}/v1"
    with openai.OpenAI(api_key="none", base_url=base_url, max_retries=0) as client:
        yield client


def test_paris(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="default", messages=MESSAGES, temperature=0)
    text = whole.choices[0].message.content
    assert "Paris" in (text or "")
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(model="default", messages=MESSAGES, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_completion(client: openai.OpenAI) -> None:
    body = {"model": "default", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 12}
    answer = client.completions.create(**body)
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    chunks = list(client.completions.create(**body, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_choices_are_what_their_seeds_give_alone(client: openai.OpenAI) -> None:
    body = {"model": "default", "messages": MESSAGES, "temperature": 1.0, "max_tokens": 24}
    both = client.chat.completions.create(**body, n=2, seed=7)
    texts = [choice.message.content for choice in both.choices]
    assert texts[0] != texts[1]
    for index, text in enumerate(texts):
        alone = client.chat.completions.create(**body, seed=7 + index)
        assert alone.choices[0].message.content == text


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default", messages=MESSAGES, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert tokens
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        best = token.top_logprobs
        assert (best[0].token, best[0].logprob) == (token.token, token.logprob)
        assert 0 >= best[0].logprob >= best[1].logprob >= best[2].logprob


def test_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="default", prompt=[100] * MAX_MODEL_LEN)
    assert refusal.value.code == "context_length_exceeded"
    assert refusal.value.param == "prompt"
    assert str(refusal.value).count(str(MAX_MODEL_LEN)) == 2
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "word " * 3000}]
        )
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")
    assert str(MAX_MODEL_LEN) in str(refusal.value)


def chat(**fields: Any) -> tuple[str, bytes]:
    return CHAT, json.dumps({"messages": MESSAGES, **fields}).encode()


def chat_text(fields: str) -> tuple[str, bytes]:
    return CHAT, (json.dumps({"messages": MESSAGES})[:-1] + ", " + fields + "}").encode()


IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]

# A request, and the field that its refusal names.
BAD_REQUESTS: list[tuple[tuple[str, bytes], str | None]] = [
    ((CHAT, b'{"messages": ['), None),
    ((CHAT, b'{"messages": "\xff"}'), None),
    ((CHAT, b"[]"), None),
    (chat(messages=[]), "messages"),
    (chat(messages="hello"), "messages"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
    (chat(messages=[{"role": "user", "content": IMAGE}]), "messages[0].content[0].type"),
    (chat(messages=[{"role": "user", "content": "\ud800"}]), "messages[0].content"),
    (chat_text('"temperature": NaN'), "temperature"),
    (chat(temperature="hot"), "temperature"),
    (chat(max_tokens=-1), "max_tokens"),
    (chat(max_tokens=2**63), "max_tokens"),
    (chat(max_tokens=1.5), "max_tokens"),
    (chat(n=-1), "n"),
    (chat(n=10**9), "n"),
    (chat(logit_bias={str(VOCAB_SIZE): 1}), "logit_bias"),
    (chat(logit_bias={"-1": 1}), "logit_bias"),
    (chat(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
    (chat(no_such_field=1), "no_such_field"),
    ((COMPLETIONS, json.dumps({"prompt": [VOCAB_SIZE]}).encode()), "prompt[0]"),
    ((COMPLETIONS, json.dumps({"prompt": ""}).encode()), "prompt"),
    ((COMPLETIONS, b"{}"), "prompt"),
]


def test_bad_requests_leave_a_neighbour_alone(server: RealServer) -> None:
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 120,
        "seed": 3,
        "temperature": 0.8,
        "ignore_eos": True,
    }
    alone = server.complete(**body)
    with ThreadPoolExecutor(1) as pool:
        neighbour = pool.submit(server.complete, **body)
        for (path, content), param in BAD_REQUESTS:
            answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (content, answer.text)
            error = answer.json()["error"]
            assert error["param"] == param, error
            assert error["message"]
        assert neighbour.result() == alone


@pytest.mark.parametrize(
    ("num_clients", "num_prompt_tokens"),
    [(6, 400), pytest.param(16, 1500, marks=pytest.mark.soak)],
)
def test_peak_memory(
    server: RealServer, smollm2_path: Path, num_clients: int, num_prompt_tokens: int
) -> None:
    def stream(client: int) -> None:
        prompt = [(client * 7919 + i * 104729) % 49_000 + 20 for i in range(num_prompt_tokens)]
        body = {"prompt": prompt, "max_tokens": 16, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", COMPLETIONS, json=body) as response:
            assert list(response.iter_lines())[-2] == "data: [DONE]"

    with ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(stream, range(num_clients)))
    assert server.peak_memory() <= smollm2_path.stat().st_size + CACHE_MEMORY + 200_000_000


def cpu_seconds_to_import_libraries() -> float:
    """What a process takes that imports the larger libraries which the server uses, and does nothing else."""
    libraries = "numpy, pydantic.main, starlette.applications, uvicorn, jinja2, tokenizers, typer.main"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {libraries}"], check=True)  # noqa: S603
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_ready_in_three_times_what_its_libraries_take(server: RealServer, smollm2_path: Path) -> None:
    """In time on a processor, of both processes: other work on the machine is none of the server's.

    The least of a few of each, since a core that is shared with other work is slower for its time.
    """
    seconds, seconds_of_libraries = server.cpu_seconds_to_ready, cpu_seconds_to_import_libraries()
    for _ in range(4):
        if seconds <= 3 * seconds_of_libraries:
            break
        other = RealServer(str(smollm2_path))
        seconds = min(seconds, other.cpu_seconds_to_ready)
        assert other.stop() == 0
        seconds_of_libraries = min(seconds_of_libraries, cpu_seconds_to_import_libraries())
    assert seconds <= 3 * seconds_of_libraries


def test_sigterm_lets_a_stream_finish(smollm2_path: Path) -> None:
    server = RealServer(str(smollm2_path))
    body = {"prompt": "Once", "max_tokens": 100, "ignore_eos": True, "stream": True}
    stop = threading.Timer(0, server.popen.terminate)
    with server.http.stream("POST", COMPLETIONS, json=body) as response:
        lines = response.iter_lines()
        first = next(lines)
        stop.start()
        events = [line for line in (first, *lines) if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.stop() == 0
    assert not any(process.is_running() for process in server.processes)
