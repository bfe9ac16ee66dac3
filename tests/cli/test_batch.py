"""`jinn batch` with a real engine on a tiny model."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("jinn._native")


def lines(ids):
    return "".join(
        json.dumps(
            {
                "custom_id": custom_id,
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "gpt-4o", "prompt": custom_id, "max_tokens": 4, "temperature": 0},
            }
        )
        + "\n"
        for custom_id in ids
    )


def test_batch_and_again(run, tiny_path, tmp_path):
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(lines("abc"))
    arguments = ("batch", requests, answers, "--model", tiny_path, "--cache-memory", "4MiB")
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "3 answered, 0 were answered before" in result.stderr
    entries = [json.loads(text) for text in answers.read_text().splitlines()]
    assert {entry["custom_id"] for entry in entries} == set("abc")
    assert {entry["response"]["body"]["usage"]["completion_tokens"] for entry in entries} == {4}

    whole = answers.read_text()
    answers.write_text(whole[: whole.rindex("{")])
    requests.write_text(lines("abcd"))
    assert "answered before" in run(*arguments).stderr
    ids = [json.loads(text)["custom_id"] for text in answers.read_text().splitlines()]
    assert sorted(ids) == list("abcd")


def test_bad_input(fail, tiny_path, tmp_path):
    requests = tmp_path / "in.jsonl"
    requests.write_text("{}\n")
    assert "line 1: custom_id" in fail("batch", requests, tmp_path / "out.jsonl", "--model", tiny_path)
    assert "no.jsonl" in fail("batch", tmp_path / "no.jsonl", tmp_path / "out.jsonl", "--model", tiny_path)
