from __future__ import annotations

import json
from math import prod

import pytest

from tiny import TinyLlama, tiny_llama_folder, tiny_llama_gguf, tiny_llama_tensors

CONFIG = TinyLlama()
NUM_PARAMETERS = sum(prod(weight.shape) for weight in tiny_llama_tensors(CONFIG).values())
KV_VALUES = 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim


def inspect(run, path):
    result = run("inspect", path, "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_json(run, tmp_path):
    path = tiny_llama_gguf(tmp_path / "tiny.gguf", CONFIG, "Q8_0")
    found = inspect(run, path)
    assert (found["family"], found["architecture"]) == ("llama", "llama")
    shapes = {
        name: found["shapes"][name] for name in ("hidden_size", "num_hidden_layers", "head_dim", "vocab_size")
    }
    assert shapes == {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 263}
    assert found["parameters"] == {"total": NUM_PARAMETERS, "active": NUM_PARAMETERS}
    num_norms = (2 * CONFIG.num_hidden_layers + 1) * CONFIG.hidden_size
    assert found["tensors"] == {
        "F32": {"count": 5, "bytes": 4 * num_norms},
        "Q8_0": {"count": 15, "bytes": (NUM_PARAMETERS - num_norms) // 32 * 34},
    }
    assert found["bytes"] == sum(tensors["bytes"] for tensors in found["tensors"].values())
    assert found["kv_bytes_per_token"]["bf16"] == 2 * KV_VALUES
    assert found["kv_bytes_per_token"]["f32"] == 4 * KV_VALUES
    assert KV_VALUES < found["kv_bytes_per_token"]["int8"] < 2 * KV_VALUES
    memory = found["memory_to_serve"]
    assert memory["total"] == memory["weights"] + memory["cache"] + memory["overhead"]
    assert memory["weights"] == found["bytes"]
    assert found["fits"] is True
    assert found["disk_bytes_per_token"] == 0


def test_folder(run, tmp_path):
    found = inspect(run, tiny_llama_folder(tmp_path / "tiny", CONFIG, num_shards=2))
    assert found["parameters"]["total"] == NUM_PARAMETERS
    assert found["tensors"] == {"F32": {"count": 20, "bytes": 4 * NUM_PARAMETERS}}


def test_table(run, tiny_path):
    lines = run("inspect", tiny_path).stdout.splitlines()
    table = dict(line.split(maxsplit=1) for line in lines)
    assert table["hidden_size"] == "64"
    assert table["parameters"].startswith(f"{NUM_PARAMETERS:,}, ")
    assert lines[-2].startswith("memory to serve")
    assert lines[-1].startswith("memory there is")
    assert lines[-1].endswith("enough")


def test_a_missing_tensor_is_named(fail, tmp_path, tiny_path):
    folder = tiny_llama_folder(tmp_path / "tiny", CONFIG)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "tensor 'model.layers.2.input_layernorm.weight' is missing" in fail("inspect", folder)


def test_a_model_is_needed(run):
    assert run("inspect").exit_code == 2


@pytest.mark.parametrize("name", ["x y", "../x"])
def test_no_name(fail, name):
    assert "is no file, no folder and no model name" in fail("inspect", name)
