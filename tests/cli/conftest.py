from __future__ import annotations

import pytest
from typer.testing import CliRunner

from jinn.cli.main import make_app
from lora_folders import llama_linear_shapes, write_lora
from tiny import tiny_llama_gguf


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    return str(tiny_llama_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))


@pytest.fixture(scope="session")
def lora_path(tmp_path_factory):
    """An adapter of the tiny model."""
    return write_lora(tmp_path_factory.mktemp("lora"), llama_linear_shapes())


@pytest.fixture
def run():
    """Runs `jinn` with these arguments: a result with exit_code, stdout and stderr."""

    def run(*arguments, text=None):
        return CliRunner().invoke(make_app(), list(map(str, arguments)), input=text, catch_exceptions=False)

    return run


@pytest.fixture
def fail(run):
    """Runs `jinn`, which must refuse in one line; gives that line."""

    def fail(*arguments):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith("jinn: ")
        assert result.stderr.count("\n") == 1
        assert result.stderr.endswith("\n")
        return result.stderr

    return fail
