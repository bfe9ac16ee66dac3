from __future__ import annotations

import json


def test_shapes_are_listed(run):
    result = run("random", "--list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["shape", "family", "layers", "parameters", "active"]
    assert ["Qwen3-30B-A3B", "qwen3_moe", "48", "30,532,122,624", "3,353,032,704"] in map(str.split, lines)


def test_a_model_is_written_and_can_be_inspected(run, tmp_path):
    result = run("random", "smollm2-135m", tmp_path / "m.gguf", "--layers", 1, "--seed", 3)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{tmp_path / 'm.gguf'}: smollm2-135m, seed 3, 3")
    described = json.loads(run("inspect", tmp_path / "m.gguf", "--json").stdout)
    assert (described["family"], described["shapes"]["num_hidden_layers"]) == ("llama", 1)


def test_bad_arguments_are_refused(fail, tmp_path):
    assert "shape 'gpt-2' is not known; there are SmolLM2-135M, " in fail(
        "random", "gpt-2", tmp_path / "m.gguf"
    )
    assert "1 to 28 layers, not 29" in fail("random", "qwen3-0.6b", tmp_path / "m.gguf", "--layers", 29)
    assert "needs SHAPE and DST, or --list" in fail("random", "qwen3-0.6b")
    (tmp_path / "m.gguf").touch()
    assert "exists already" in fail("random", "qwen3-0.6b", tmp_path / "m.gguf", "--layers", 1)
