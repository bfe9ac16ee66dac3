from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from jinn.cli.main import main
from jinn.engine.client import EngineError
from jinn.engine.config import EngineConfig
from jinn.server.config import ServerConfig


@pytest.fixture
def served(monkeypatch):
    """The configs with which the server was called, instead of serving."""
    calls = []
    monkeypatch.setattr("jinn.server.serve.serve", lambda *configs: calls.append(configs))
    return calls


def test_flags(run, served, tiny_path):
    flags = {
        "--host": "127.0.0.2", "--port": 9, "--threads": 2, "--max-model-len": 128, "--max-num-seqs": 3,
        "--max-num-batched-tokens": 64, "--cache-memory": "1.5MiB", "--kv-cache-dtype": "int8",
        "--api-key": "secret", "--served-model-name": "mine", "--chat-template": "t.jinja",
        "--log-level": "debug",
    }  # fmt: skip
    assert run("serve", tiny_path, *(part for flag in flags.items() for part in flag)).exit_code == 0
    server, engine, *_ = served[0]
    assert server == ServerConfig("127.0.0.2", 9, "secret", "mine", "t.jinja", "debug")
    assert engine == EngineConfig(
        tiny_path,
        num_threads=2,
        max_model_len=128,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        cache_memory=3 * 2**19,
        kv_cache_dtype="int8",
        log_level="debug",
    )


def test_more_models(run, served, tiny_path):
    assert run("serve", tiny_path, "--model", f"a={tiny_path}", "--model", f"b={tiny_path}").exit_code == 0
    assert served[0][2] == {"a": tiny_path, "b": tiny_path}


@pytest.fixture
def serve_with(monkeypatch, served, tiny_path):
    """Calls `main` with this way to start an engine; gives the engine that the server got."""

    def serve_with(spawn):
        monkeypatch.setattr("sys.argv", ["jinn", "serve", tiny_path])
        monkeypatch.setattr("jinn.engine.spawn.spawn", spawn)
        with pytest.raises(SystemExit):
            main()
        return served[0][3]

    return serve_with


def test_the_server_gets_the_engine_that_main_has_started(serve_with):
    assert serve_with(lambda: "spawned") == "spawned"


def test_an_engine_that_does_not_start_is_left_to_the_server(serve_with):
    def spawn():
        raise OSError("no more processes")

    assert serve_with(spawn) is None


@pytest.mark.parametrize(
    ("model", "error"),
    [("a", "models must"), ("=x", "models must"), ("a=", "models must"), ("a=no.gguf", "no.gguf")],
)
def test_more_models_are_checked(fail, served, tiny_path, model, error):
    assert error in fail("serve", tiny_path, "--model", model)
    assert not served


def test_adapters(run, served, tiny_path, tmp_path):
    config = tmp_path / "jinn.toml"
    config.write_text('lora = ["c=third"]\n')
    assert run("serve", tiny_path, "--lora", "a=first", "--lora", "b=x=y", "--config", config).exit_code == 0
    assert served[0][1].lora_adapters == {"a": "first", "b": "x=y"}
    assert run("serve", tiny_path, "--config", config).exit_code == 0
    assert served[1][1].lora_adapters == {"c": "third"}


@pytest.mark.parametrize("adapters", [("a",), ("=x",), ("a=",), ("a=x", "a=y")])
def test_adapters_are_checked(fail, served, tiny_path, adapters):
    arguments = [part for adapter in adapters for part in ("--lora", adapter)]
    assert "lora must be distinct names with folders" in fail("serve", tiny_path, *arguments)
    assert not served


def test_defaults(run, served, tiny_path):
    run("serve", tiny_path)
    assert served == [(ServerConfig(), EngineConfig(tiny_path), {}, None)]


def test_flags_go_before_the_file(run, served, tiny_path, tmp_path):
    config = tmp_path / "jinn.toml"
    config.write_text(
        f'model = "{tiny_path}"\nport = 1\nthreads = 3\n'
        'cache-memory = "1MiB"\nmax_step_ms = 50\nlog-level = "error"\n'
    )
    assert run("serve", "--config", config, "--port", 2).exit_code == 0
    server, engine, *_ = served[0]
    assert (server.port, server.log_level) == (2, "error")
    assert (engine.model, engine.num_threads, engine.cache_memory) == (tiny_path, 3, 2**20)
    assert engine.max_step_ms == 50


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("prot = 1", "unknown setting prot; known are activations, allowed_hosts"),
        ("num_threads = 1", "unknown setting num_threads"),
        ('port = "1"', "port must not be of type str"),
        ("port = true", "port must not be of type bool"),
        ("host = 5", "host must not be of type int"),
        ("threads = 0", "num_threads must be between"),
        ("cache_memory = '2 apples'", "size '2 apples'"),
        ("log_level = 'loud'", "log_level must be one of"),
        ("port = ", "jinn.toml: Invalid value"),
        ("[server]\nport = 1", "unknown setting server"),
    ],
)
def test_config_files_are_checked(fail, served, tiny_path, tmp_path, text, error):
    config = tmp_path / "jinn.toml"
    config.write_text(text)
    assert error in fail("serve", tiny_path, "--config", config)
    assert served == []


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--host", "0.0.0.0"], "api_keys must be set"),  # noqa: S104
        (["--port", 70000], "port must be between"),
        (["--cache-memory", "2G"], "size '2G'"),
        (["--kv-cache-dtype", "f8"], "kv_cache_dtype must be one of"),
        (["--max-model-len", 1], "max_model_len must be between"),
        (["--config", "missing.toml"], "missing.toml"),
    ],
)
def test_flags_are_checked(fail, served, tiny_path, flags, error):
    assert error in fail("serve", tiny_path, *flags)
    assert served == []


def test_an_engine_that_cannot_start_is_one_line(fail, tiny_path, monkeypatch):
    def serve(*_):
        raise EngineError("cache_memory is too small")

    monkeypatch.setattr("jinn.server.serve.serve", serve)
    assert fail("serve", tiny_path) == "jinn: cache_memory is too small\n"


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_until_ready(process, url):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:  # noqa: S310
                if answer.status == 200:
                    return
        except urllib.error.URLError:
            time.sleep(0.02)
    raise AssertionError("the server was not ready in time")


def test_a_real_server(tiny_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from jinn.cli.main import main; main()", "serve", tiny_path]
    flags = ["--port", str(port), "--cache-memory", "1MiB", "--threads", "1", "--log-level", "error"]
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            wait_until_ready(process, url)
            body = {"model": "tiny", "prompt": "the thin", "max_tokens": 4, "temperature": 0}
            request = urllib.request.Request(  # noqa: S310
                f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                assert json.load(answer)["usage"]["completion_tokens"] == 4
        finally:
            process.send_signal(signal.SIGTERM)
            errors = process.communicate(timeout=30)[1]
        assert process.returncode == 0
        assert "Traceback" not in errors
