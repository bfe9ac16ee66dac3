"""Batch lines through the app."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest

from jinn.server.app import App
from jinn.server.batch import BatchRequest, answered_ids, read_requests, run_batch

from .conftest import chat_body
from .fakes import ANSWER, FakeEngine

CHAT = "/v1/chat/completions"


def line(custom_id: str, **fields: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": chat_body(), **fields})


def run(app: App, requests: list[BatchRequest], concurrency: int = 4) -> tuple[int, list[dict[str, Any]]]:
    output = io.BytesIO()
    moves: list[tuple[int, int]] = []
    num_refused = asyncio.run(run_batch(app, requests, output, concurrency, lambda *move: moves.append(move)))
    assert moves == [(i + 1, len(requests)) for i in range(len(requests))]
    return num_refused, [json.loads(text) for text in output.getvalue().splitlines()]


def test_every_request_is_answered(app: App, engine: FakeEngine) -> None:
    requests = [BatchRequest(f"r{i}", CHAT, chat_body(max_tokens=i + 1)) for i in range(9)]
    requests.append(BatchRequest("bad", CHAT, chat_body(n=0)))
    requests.append(BatchRequest("vector", "/v1/embeddings", {"input": "x"}))
    num_refused, lines = run(app, requests)
    assert num_refused == 1
    by_id = {entry["custom_id"]: entry for entry in lines}
    assert set(by_id) == {request.custom_id for request in requests}
    for i in range(9):
        response = by_id[f"r{i}"]["response"]
        assert response["status_code"] == 200
        assert response["request_id"].startswith("req_")
        content = response["body"]["choices"][0]["message"]["content"]
        assert content == ANSWER.encode()[: i + 1].decode()
        assert by_id[f"r{i}"]["error"] is None
    assert by_id["bad"]["response"]["body"]["error"]["param"] == "n"
    assert not engine.running


def test_a_run_that_was_cut_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert answered_ids(path) == set()
    path.write_text(line("a") + "\n" + line("b") + "\n" + line("c")[:20])
    assert answered_ids(path) == {"a", "b"}
    assert path.read_text() == line("a") + "\n" + line("b") + "\n"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        answered_ids(path)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x", "line 2: it is not JSON"),
        ("[]", "line 2: it is no object"),
        (line(""), "line 2: custom_id"),
        (line("a"), "line 2: custom_id 'a' is there twice"),
        (line("b", method="GET"), "line 2: method"),
        (line("b", url="/v1/files"), "line 2: url"),
        (line("b", body=1), "line 2: body"),
        (line("b", body={"stream": True}), "line 2: body.stream"),
        ("[" * 100_000, "line 2: it is not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(line("a") + "\n" + text + "\n")
    with pytest.raises(ValueError, match=error):
        read_requests(path)


def test_busy_server_is_asked_again(app: App, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []

    async def sleep(seconds: float) -> None:
        delays.append(seconds)
        engine.is_alive = True

    monkeypatch.setattr("jinn.server.batch.asyncio.sleep", sleep)
    engine.is_alive = False
    engine.step_seconds = None

    async def ask() -> list[dict[str, Any]]:
        output = io.BytesIO()
        task = asyncio.create_task(
            run_batch(app, [BatchRequest("a", CHAT, chat_body(max_tokens=1))], output, 1, lambda *_: None)
        )
        while not engine.running:
            await asyncio.wait([task], timeout=0.01)
        engine.step()
        await task
        return [json.loads(text) for text in output.getvalue().splitlines()]

    (entry,) = asyncio.run(ask())
    assert entry["response"]["status_code"] == 200
    assert delays == [5.0]
