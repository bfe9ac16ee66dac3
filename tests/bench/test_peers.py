from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from models.transformers_models import random_model
from tiny import tiny_llama_gguf


@pytest.fixture(scope="module")
def peers(load_script):
    return load_script("peers")


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(0o755)


@pytest.fixture
def llama_folder(tmp_path):
    """Programs that answer as llama.cpp's do, and where FAKE_SIGILL is set, stop when they repack."""
    program(
        tmp_path,
        "llama-bench",
        "import json, os, sys\n"
        "options = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "if os.environ.get('FAKE_SIGILL') and options['--repack'] == '1': os.kill(os.getpid(), 4)\n"
        "prefill = {'n_prompt': 512, 'n_gen': 0, 'samples_ts': [8.0, 1.0, 9.0]}\n"
        "decode = {'n_prompt': 0, 'n_gen': 128, 'samples_ts': [3.0, 1.0, 2.0]}\n"
        "print(json.dumps([prefill, decode] if options['-p'] == '512' else [decode]))",
    )
    program(
        tmp_path,
        "llama-batched-bench",
        "import json, sys\n"
        "assert '--no-repack' in sys.argv\n"
        "assert sys.argv[sys.argv.index('-c') + 1] == '8192'\n"
        "print('log'); print(json.dumps({'pl': 32, 'speed_tg': 7.5}))",
    )
    return tmp_path


def test_llama_cpp_is_run_without_repacking_where_repacking_stops_it(peers, llama_folder, monkeypatch):
    assert peers.LlamaCpp(llama_folder, Path("m.gguf"), 2).settings == "repacked weights"
    monkeypatch.setenv("FAKE_SIGILL", "1")
    peer = peers.LlamaCpp(llama_folder, Path("m.gguf"), 2)
    assert peer.settings.startswith("no repacking")
    assert peer.measure(peers.Workload(512, 0, (1,), 3)) == {
        "prefill 512": 8.0,
        "decode 128 at depth 0, 1 sequence": 2.0,
    }
    assert peer.measure(peers.Workload(0, 128, (32,), 1)) == {"decode 128 at depth 128, 32 sequences": 7.5}


def test_jinn_is_measured_by_its_own_command(peers, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "DECODED", 3)
    tiny_path = tiny_llama_gguf(tmp_path / "tiny.gguf")
    jinn = peers.Jinn(tiny_path, 1)
    assert list(jinn.measure(peers.Workload(20, 0, (1,), 1))) == [
        "prefill 20",
        "decode 3 at depth 0, 1 sequence",
    ]
    assert set(jinn.shares) == {"prefill 20", "decode 3 at depth 0, 1 sequence"}
    assert jinn.limits["read_bandwidth"] > 1e8
    assert jinn.settings.endswith(" kernels")


def test_transformers_is_measured_alike(peers, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "DECODED", 3)
    random_model("llama untied").save_pretrained(tmp_path)
    peer = peers.Transformers(tmp_path, 1)
    speeds = peer.measure(peers.Workload(20, 4, (1,), 2))
    assert list(speeds) == ["prefill 20", "decode 3 at depth 4, 1 sequence"]
    assert min(speeds.values()) > 0


def test_what_is_measured_can_be_chosen(peers):
    assert peers.workloads(512, [0, 512], [16], 3) == [
        peers.Workload(512, 0, (1,), 3),
        peers.Workload(0, 512, (1,), 3),
        peers.Workload(0, 128, (16,), 1),
    ]
    assert peers.workloads(100, [7], [], 1) == [peers.Workload(100, 7, (1,), 1)]
    assert peers._numbers("none") == []


def test_a_run_is_repeated_until_others_leave_it_alone(peers, monkeypatch):
    shares = iter([0.5, 0.01, 0.0])
    monkeypatch.setattr(peers, "_sample", lambda measure: peers.Sample(measure(), next(shares)))
    assert peers.Quiet(0.05, 3, 0.0).run(lambda: {"a": 1.0}) == peers.Sample({"a": 1.0}, 0.01)
    assert next(shares) == 0.0


def test_the_least_disturbed_run_is_kept_where_none_is_quiet(peers, monkeypatch):
    shares = iter([0.5, 0.3, 0.4])
    monkeypatch.setattr(peers, "_sample", lambda measure: peers.Sample(measure(), next(shares)))
    assert peers.Quiet(0.05, 3, 0.0).run(dict).others == 0.3


def test_others_are_those_who_are_no_child(peers):
    script = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    sample = peers._sample(lambda: peers._run([sys.executable, "-c", script]) and {})
    assert 0 <= sample.others <= 1 + 1 / (os.cpu_count() or 1)
    assert peers._children_seconds() >= 0.3


def test_ratios_are_of_neighbours(peers, tmp_path):
    jinn = peers.Jinn(Path("m.gguf"), 2)
    jinn._note_share("c", {"bandwidth": 0.2, "compute": 0.6}, 30.0)
    jinn._note_share("c", {"bandwidth": 0.2, "compute": 0.3}, 30.0)
    speeds = {"jinn": {"c": [10.0, 30.0, 20.0]}, "llama.cpp": {"c": [5.0, 3.0, 20.0]}}
    ours, theirs = peers.summary(jinn, speeds)
    assert (ours["tok_s"], ours["jinn_ratio"], ours["limit"]) == (20.0, 1.0, "compute")
    assert ours["share"] == pytest.approx(20.0 * 0.3 / 30.0)
    assert (theirs["tok_s"], theirs["jinn_ratio"], theirs["jinn_ratio_range"]) == (5.0, 2.0, [1.0, 10.0])
    assert theirs["spread"] == pytest.approx(17 / 5)
    report = {
        "model": "m.gguf",
        "threads": 2,
        "pairs": 3,
        "machine": peers.machine(),
        "rows": [ours, theirs],
        "not_run": ["other"],
        "settings": {"jinn": "amx kernels"},
        "limits": {"read_bandwidth": 3e10, "int8": 1e12, "bf16": 1e12, "f32": 1e12},
        "others": 0.02,
    }
    table = peers.markdown(json.loads(json.dumps(report)))
    assert "| c | llama.cpp | 5 | 340% | 5% of compute | **2.00×** (1.00–10.00) |" in table
    assert "| all | other | not run |" in table
