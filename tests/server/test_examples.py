"""The examples of the docs, run as they stand against a server whose model says what they expect."""

from __future__ import annotations

import asyncio
import re
import runpy
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from jinn.engine.client import Sink
from jinn.engine.messages import Submit
from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models
from jinn.server.service import Service

from .fakes import FakeEngine
from .test_turns import HYBRID, Template, ThinkingTokenizer

DOCS = Path(__file__).parents[2] / "docs"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHTS = "<think>\nTry the primes up to 31.\n</think>\n\n"


class Model(FakeEngine):
    """Calls for the weather, reports what it was told, and thinks about numbers unless told not to."""

    def __init__(self, template: Template) -> None:
        super().__init__()
        self._template = template

    def submit(self, request: Submit, sink: Sink) -> None:
        prompt = bytes(request.prompt_ids).decode()
        if "sunny" in prompt:
            answer = "It is sunny in Paris."
        elif "weather" in prompt:
            answer = CALL
        else:
            answer = ("" if self._template.given.get("enable_thinking") is False else THOUGHTS) + "Yes."
        self.answer = list(answer.encode())
        super().submit(request, sink)


@pytest.fixture
def http_client() -> TestClient:
    template = Template()
    config = ServerConfig()
    service = Service(
        config, Model(template), ThinkingTokenizer(), template, file_name="x", chat_format=HYBRID
    )
    asyncio.run(service.start())
    return TestClient(App(Models.of(service)))


@pytest.mark.parametrize(
    ("page", "lines"),
    [
        ("tools", ["It is sunny in Paris.\n", "0 call_… weather \n0 None None {\n"]),
        ("reasoning", ["Try the primes up to 31.\nYes.\n", "Yes. Yes.\n"]),
    ],
)
def test_examples(
    page: str,
    lines: list[str],
    http_client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def client(**options: Any) -> openai.OpenAI:
        return plain_client(http_client=http_client, max_retries=0, **options)

    plain_client = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", client)
    examples = re.findall(
        r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "examples.py").write_text("".join(examples))
    runpy.run_path(str(tmp_path / "examples.py"))
    printed = re.sub(r"call_\w+", "call_…", capsys.readouterr().out)
    for line in lines:
        assert line in printed
