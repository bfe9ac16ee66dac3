"""A live server with the packaged model, which every client talks to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.server.real import RealServer


@pytest.fixture(scope="session")
def base_url(smollm2_path: Path) -> Iterator[str]:
    """The server's root; OpenAI's clients want its /v1."""
    pytest.importorskip("jinn._native")
    template = str(Path(__file__).with_name("tools.jinja"))  # the model's own, and tools
    limits = ("--cache-memory", "256MiB", "--max-model-len", "2048")
    server = RealServer(str(smollm2_path), *limits, "--chat-template", template)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        assert server.stop() == 0
