"""The conformance checks: they pass on this server, and find what is wrong with one that is broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jinn.cli.main import make_app
from jinn.conformance import checks
from jinn.conformance.checks import CHECKS
from jinn.conformance.report import FAILED, PASSED, Report, Result, run_checks
from jinn.conformance.target import Failure, Reply, Target
from jinn.server.config import ServerConfig

from .test_page import Site

# What the fake engine's one answer allows to be checked.
GROUPS = ("models", "stream", "completions", "errors", "security", "embeddings")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site(ServerConfig(api_key="sk-page"))
    yield site
    site.close()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(make_app(), ["conformance", *arguments], catch_exceptions=False)


def test_this_server_passes(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    url = f"{site.url}/v1"
    only = ("--only", ",".join(GROUPS))
    result = run("--base-url", url, "--api-key", "sk-page", *only, "--report", str(path))
    assert result.exit_code == 0, result.stdout
    report = json.loads(path.read_text())
    assert report["model"] == "tiny.gguf"
    assert report["counts"] == {"passed": sum(len(CHECKS[group]) for group in GROUPS)}


def test_wrong_key_and_bad_options() -> None:
    for arguments, error in (
        (("--base-url", "ftp://x"), "base_url"),
        (("--base-url", "http://127.0.0.1:1/v1", "--only", "nonsense"), "unknown group nonsense"),
        (("--base-url", "http://127.0.0.1:1/v1", "--report", "x.txt"), "--report"),
        (("--base-url", "http://127.0.0.1:1/v1"), "127.0.0.1:1"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert error in result.stderr


class Broken(Target):
    """A server whose answers are `reply`, and whose streams are `stream_text`."""

    def __init__(self, reply: Any = None, stream_text: str = "", status: int = 200) -> None:
        super().__init__("http://127.0.0.1:1/v1", None, "m")
        self._reply = Reply(status, {}, json.dumps(reply).encode())
        self._stream_text = stream_text

    def _request(self, *_: Any) -> Reply:
        return self._reply

    def events(self, *_: Any) -> list[str]:
        return self._stream_text.split("\n\n")[:-1]


def chunk(**fields: Any) -> str:
    choice = {"index": 0, "delta": {}, "finish_reason": None, **fields}
    return f"data: {json.dumps({'id': 'a', 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


CALL = {"index": 0, "id": "c", "function": {"name": "get_weather", "arguments": ""}}
REST = {"index": 0, "function": {"arguments": '{"city": "Paris"}'}}
FAULTS = {
    "flat error body": (checks.error_unknown_model, Broken({"message": "no"}, status=404)),
    "integer code": (
        checks.error_unknown_model,
        Broken({"error": {"message": "no", "type": "x", "code": 404}}, status=404),
    ),
    "422": (checks.error_types, Broken({"detail": []}, status=422)),
    "no DONE": (checks.stream_grammar, Broken(stream_text=chunk())),
    "named event": (checks.stream_grammar, Broken(stream_text=f"event: x\n{chunk()}data: [DONE]\n\n")),
    "role repeated": (
        checks.stream_role_first,
        Broken(stream_text=2 * chunk(delta={"role": "assistant"})),
    ),
    "id of a call repeated": (
        checks.tools_stream,
        Broken(stream_text=chunk(delta={"tool_calls": [CALL]}) + chunk(delta={"tool_calls": [CALL]})),
    ),
    "call without an index": (
        checks.tools_stream,
        Broken(stream_text=chunk(delta={"tool_calls": [{**CALL, "index": None}]})),
    ),
    "arguments as an object": (
        checks.tools_required,
        Broken({"choices": [{"finish_reason": "tool_calls", "message": {"tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": {}}}]}}]}),
    ),
    "usage that does not add up": (
        checks.chat_usage,
        Broken({"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 3}}),
    ),
    "ignored schema": (
        checks.schema_never_ignored,
        Broken({"choices": [{"message": {"content": '{"a": 8}'}}]}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    check, target = FAULTS[name]
    with pytest.raises(Failure):
        check(target)


def test_a_good_tool_stream_passes() -> None:
    deltas = [{"tool_calls": [CALL]}, {"tool_calls": [REST]}]
    checks.tools_stream(Broken(stream_text="".join(chunk(delta=delta) for delta in deltas)))


def test_another_shape_is_a_failure_and_not_a_crash() -> None:
    report = run_checks(Broken({"object": "list", "data": [{"id": "m"}], "choices": [{}]}), {"chat"})
    assert report.counts[FAILED] >= len(CHECKS["chat"]) - 2


def test_html_is_escaped() -> None:
    report = Report("http://x", "<b>", (Result("chat", "n", "t", PASSED, "<script>"),))
    assert "<script>" not in report.to_html()
    assert "&lt;b&gt;" in report.to_html()
