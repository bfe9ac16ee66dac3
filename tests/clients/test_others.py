"""Clients with dependencies of their own, each as a script in an environment of `make test-clients`.

Without that environment they are skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "clients"
PYTHON, NODE_MODULES = FOLDER / "venv" / "bin" / "python", FOLDER / "node_modules"


def run(*command: object) -> None:
    result = subprocess.run(  # noqa: S603
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": "", "LLM_USER_PATH": str(FOLDER)},
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize(
    "name", ["anthropic", "instructor", "litellm", "llm", "lm_eval", "pydantic_ai", "qwen_agent"]
)
def test_python_client(base_url: str, name: str) -> None:
    if not PYTHON.exists():
        pytest.skip("run `make test-clients`")
    run(PYTHON, HERE / "scripts" / f"{name}_client.py", base_url)


def test_node_clients(base_url: str) -> None:
    if not NODE_MODULES.exists():
        pytest.skip("run `make test-clients`")
    script = FOLDER / "node_client.mjs"  # modules are looked for beside it
    script.write_text((HERE / "scripts" / "node_client.mjs").read_text())
    run("node", script, base_url)
