from __future__ import annotations

import json
import subprocess
import sys
import time
from signal import SIGTERM

from tiny import TinyLlama, tiny_llama_gguf


def test_converting_prints_what_it_costs(run, tiny_path, tmp_path):
    target, report = tmp_path / "q.gguf", tmp_path / "report.json"
    result = run("convert", tiny_path, target, "--type", "q8_0", "--report", report)
    assert result.exit_code == 0
    *table, summary = result.stdout.splitlines()
    assert table[0].split() == ["tensor", "type", "relative", "RMS", "error", "largest", "error"]
    assert any(line.startswith("blk.0.attn_q.weight") and "F32 to Q8_0" in line for line in table)
    assert "and 3 more with less error (--report FILE has all)" in table
    assert summary.startswith(f"{target}: 20 tensors, ")
    assert summary.endswith(", 5 of them exact")
    written = json.loads(report.read_text())
    assert len(written["tensors"]) == 20
    assert written["bytes"] < target.stat().st_size
    assert set(written["tensors"][0]) == {"name", "shape", "source_type", "type", "rms_error", "max_error"}


def test_an_exact_conversion_prints_one_line(run, tiny_path, tmp_path):
    result = run("convert", tiny_path, tmp_path / "hf")
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'hf'}: 20 tensors, 314.4 kB, 20 of them exact\n"
    assert run("inspect", tmp_path / "hf").exit_code == 0


def test_bad_arguments_are_refused(fail, tiny_path, tmp_path):
    assert "'q9' is not one of f32, " in fail("convert", tiny_path, tmp_path / "new.gguf", "--type", "q9")
    assert "no file, no folder" in fail("convert", "nothing here", tmp_path / "new.gguf")
    (tmp_path / "there").mkdir()
    assert "exists already; --force overwrites it" in fail("convert", tiny_path, tmp_path / "there")


def test_a_terminated_conversion_leaves_nothing(tmp_path):
    source = tiny_llama_gguf(tmp_path / "tiny.gguf", TinyLlama(hidden_size=1024, intermediate_size=4096))
    code = "from jinn.cli.main import main; main()"
    arguments = ("convert", source, tmp_path / "new.gguf", "--type", "q4_k")
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])  # noqa: S603
    while not list(tmp_path.glob(".new.gguf.*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(SIGTERM)
    assert process.wait(20) == 128 + SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
