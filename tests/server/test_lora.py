"""`jinn serve --lora` as a process: adapters and their model asked at once, and adapters that are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lora_folders import llama_linear_shapes, write_lora
from tiny import tiny_llama_gguf

from .real import RealServer

MODELS = ("tiny.gguf", "first", "second")
BODY = {"prompt": "the thing in the hint", "max_tokens": 30, "temperature": 1, "seed": 5, "logprobs": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    tiny_llama_gguf(folder / "tiny.gguf", format_name="Q4_0")
    for seed, name in enumerate(MODELS[1:]):
        write_lora(folder / name, llama_linear_shapes(), seed)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RealServer]:
    adapters = [part for name in MODELS[1:] for part in ("--lora", f"{name}={folder / name}")]
    server = RealServer(str(folder / "tiny.gguf"), *adapters, "--cache-memory", "16MiB", "--threads", "1")
    try:
        yield server
    finally:
        assert server.stop() == 0


def ask(server: RealServer, model: str, **fields: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/completions", json={**BODY, "model": model, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_mixed_requests_have_the_bytes_of_each_alone(server: RealServer) -> None:
    alone = {model: ask(server, model) for model in MODELS}
    texts = [answer["choices"][0]["logprobs"] for answer in alone.values()]
    assert texts[0] != texts[1] != texts[2] != texts[0]
    assert len({answer["system_fingerprint"] for answer in alone.values()}) == 3
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda i: ask(server, MODELS[i % 3]), range(12)))
    for i, answer in enumerate(answers):
        assert answer["model"] == MODELS[i % 3]
        assert answer["choices"] == alone[MODELS[i % 3]]["choices"]


def test_a_prompt_is_cached_for_one_adapter(server: RealServer) -> None:
    def num_cached(model: str) -> int:
        count: int = ask(server, model, prompt="in the hint the thing is")["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
        return count

    first = [num_cached(model) for model in MODELS]
    assert first == [0, 0, 0]
    assert all(num_cached(model) > 0 for model in MODELS)


def test_metrics_go_on(server: RealServer) -> None:
    metrics = server.http.get("/metrics").text
    assert 'jinn:request_success_total{finished_reason="length",model_name="tiny.gguf"}' in metrics


def test_a_bad_adapter_ends_the_start_with_its_reason(folder: Path, tmp_path: Path) -> None:
    bad = write_lora(tmp_path / "bad", {"model.layers.9.self_attn.q_proj": (64, 64)})
    script = Path(__file__).with_name("real_process.py")
    arguments = ["serve", str(folder / "tiny.gguf"), "--lora", f"bad={bad}", "--port", "0"]
    process = subprocess.run(  # noqa: S603
        [sys.executable, str(script), *arguments],
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 2
    assert "bad: module 'model.layers.9.self_attn.q_proj' is none of the model's" in process.stderr
