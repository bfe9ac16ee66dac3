from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from gguf import GGUFWriter

from jinn.cli.main import COMMANDS


def jinn(*arguments):
    """A real process."""
    command = [sys.executable, "-c", "from jinn.cli.main import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)  # noqa: S603


def test_help_names_every_command(run):
    result = run("--help")
    assert result.exit_code == 0
    assert [name for name in COMMANDS if f"\n  {name} " not in result.stdout] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys, jinn.cli.main;"
        "jinn.cli.main.make_app();"
        "print(*({'numpy', 'rich', 'starlette', 'jinja2', 'tokenizers', 'asyncio'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == []  # noqa: S603


def test_a_command_imports_no_other():
    code = (
        "import sys, jinn.cli.main; sys.argv[1:] = ['list', '--help'];\n"
        "try: jinn.cli.main.main()\n"
        "except SystemExit: print({'jinn.cli.models', 'jinn.cli.serve'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)  # noqa: S603
    assert run.stdout.splitlines()[-1] == "{'jinn.cli.models'}"


def test_version(run):
    assert run("--version").stdout == f"{metadata.version('jinn')}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["generate", "--nonsense"], ["bench", "--repeat", "x"]])
def test_usage_errors(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr


@pytest.fixture
def bad_models(tmp_path, tiny_path):
    """A path by what is wrong with it."""
    missing, magic, cut, unknown, empty = (
        tmp_path / name for name in ("missing.gguf", "magic.gguf", "cut.gguf", "unknown.gguf", "empty")
    )
    magic.write_bytes(b"PK\x03\x04" + bytes(100))
    with open(tiny_path, "rb") as file:
        cut.write_bytes(file.read()[:-1000])
    writer = GGUFWriter(unknown, "mamba9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    empty.mkdir()
    return {
        "no such file": missing,
        "which is no known model": magic,
        "past the end of the file": cut,
        "architecture 'mamba9' is not supported; supported are": unknown,
        "a folder without config.json": empty,
    }


@pytest.mark.parametrize(
    "command",
    [["generate", "--prompt", "x"], ["bench"], ["inspect"], ["chat"]],
    ids=lambda command: command[0],
)
def test_bad_models_are_refused_in_one_line(fail, bad_models, command):
    for error, path in bad_models.items():
        line = fail(*command, path)
        assert error in line
        assert str(path) in line


def test_a_process_shows_no_traceback(bad_models):
    for error, path in bad_models.items():
        result = jinn("generate", path, "--prompt", "x")
        assert (result.returncode, result.stdout) == (2, "")
        assert error in result.stderr
        assert result.stderr.count("\n") == 1


def test_serve_refuses_a_bad_model_in_one_line(bad_models):
    result = jinn("serve", bad_models["which is no known model"], "--port", "0")
    assert result.returncode == 2
    assert "which is no known model" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_pulled_name_that_is_missing_says_the_command(fail, tmp_path, monkeypatch):
    monkeypatch.setenv("JINN_HOME", str(tmp_path))
    assert "jinn pull hf:owner/name" in fail("inspect", "owner/name")
