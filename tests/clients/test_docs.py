"""The examples of the docs that talk to a server, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("serving.md", "api.md", "clients.md")
EXAMPLE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def examples() -> list[Any]:
    return [
        pytest.param(code, id=f"{page}-{number}")
        for page in PAGES
        for number, code in enumerate(EXAMPLE.findall((DOCS / page).read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize("code", examples())
def test_example(base_url: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "http://127.0.0.1:8000" in code
    exec(code.replace("http://127.0.0.1:8000", base_url), {})  # noqa: S102
    printed = capsys.readouterr().out
    assert printed.strip()
    if "capital of France" in code:
        assert "Paris" in printed
