"""A config or checkpoint that jinn cannot run is refused in one line that names what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jinn.engine.config import EngineConfig
from jinn.engine.loading import load_runner
from jinn.engine.reference_runner import load_reference_runner
from jinn.models.fields import ConfigError
from jinn.models.llama import Llama
from jinn.models.parameters import tree
from jinn.models.registry import model_of
from jinn.models.rope import rope_from_hf, rope_from_theta
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError
from tiny import TinyLlama, tiny_llama_folder, tiny_llama_gguf

from .transformers_llama import LLAMA3_ROPE, SMALL

LOADERS = pytest.mark.parametrize("loader", [load_runner, load_reference_runner], ids=["native", "reference"])
TINY = TinyLlama()


def load(loader, path, **settings):
    return loader(EngineConfig(str(path), num_threads=1, **settings), lambda loaded, total: None)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, -1, 2**31, "64", 64.0, True, [64], float("nan")])
def test_a_wrong_size_is_named(field, value):
    with pytest.raises(ConfigError, match=f"config field {field} "):
        Llama.from_hf({**SMALL, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 6),
        ("head_dim", 2**30),
        ("num_hidden_layers", 10**9),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", "1e-5"),
        ("max_position_embeddings", -5),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("hidden_act", "gelu"),
        ("hidden_act", 7),
        ("rope_parameters", [1]),
    ],
)
def test_a_wrong_field_is_named(field, value):
    name = {"num_key_value_heads": "num_attention_heads"}.get(field, field)
    with pytest.raises(ConfigError, match=f"config field {name} "):
        Llama.from_hf({**SMALL, field: value})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_type": "yarn"}, "rope_type"),
        ({"rope_type": 3}, "rope_type"),
        ({"factor": None}, "factor"),
        ({"low_freq_factor": 0}, "low_freq_factor"),
        ({"high_freq_factor": None}, "high_freq_factor"),
        ({"original_max_position_embeddings": "8192"}, "original_max_position_embeddings"),
        ({"high_freq_factor": 1.0, "low_freq_factor": 1.0}, "high_freq_factor"),
    ],
)
def test_a_wrong_rope_is_named(change, name):
    with pytest.raises(ConfigError, match=f"config field {name} "):
        Llama.from_hf({**SMALL, "rope_parameters": {**LLAMA3_ROPE, **change}})


@pytest.mark.parametrize("factor", [4.0, 8.0, 32.0])
def test_llama3_frequencies_are_those_of_transformers(factor):
    rope = {**LLAMA3_ROPE, "rope_theta": 500000.0, "factor": factor, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    for ours in (rope_from_hf({"rope_parameters": rope}, 128), rope_from_hf({"rope_scaling": rope}, 128)):
        np.testing.assert_allclose(ours.inv_freq, expected.numpy(), rtol=1e-6)
        assert ours.attention_factor == attention_factor


def test_old_and_new_rope_fields_mean_the_same():
    old = rope_from_hf({"rope_theta": 1e6}, 64)
    assert old == rope_from_hf({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 64)
    assert old == rope_from_hf({"rope_theta": 1e6, "rope_scaling": None}, 64)
    assert old == rope_from_theta(1e6, 64)
    assert old != rope_from_hf({}, 64)


def test_an_unknown_architecture_is_named_with_what_is_supported(tmp_path):
    folder = tiny_llama_folder(tmp_path, TINY)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(ConfigError, match=r"'mamba' is not supported; supported are .*llama"),
    ):
        model_of(checkpoint)


def rewrite(folder, change):
    """Change the folder's tensors, a dict, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@LOADERS
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named(tmp_path, loader, name):
    folder = tiny_llama_folder(tmp_path, replace(TINY, tie_word_embeddings=False))
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsError, match=f"tensor '{name}' is missing"):
        load(loader, folder)


@LOADERS
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"])
def test_a_wrong_shape_is_named(tmp_path, loader, name):
    folder = tiny_llama_folder(tmp_path, TINY)
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1].copy()}))
    with pytest.raises(WeightsError, match=rf"tensor '{name}' has shape \[.*\], not \["):
        load(loader, folder)


@LOADERS
def test_a_number_that_is_not_finite_is_named(tmp_path, loader):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = tiny_llama_folder(tmp_path, TINY)
    rewrite(folder, lambda tensors: np.copyto(tensors[name][5, 5:6], np.nan))
    with pytest.raises(WeightsError, match=f"{name}.*not finite|{name}.*NaN|{name}.*finite"):
        load(loader, folder)


@LOADERS
def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path, loader, monkeypatch):
    path = tiny_llama_gguf(tmp_path / "tiny.gguf", TINY)
    monkeypatch.setattr("tiny.TinyLlama.vocab_size", property(lambda config: 100))
    small = tiny_llama_gguf(tmp_path / "small.gguf", TINY)
    load(loader, path, cache_memory=2**20)
    with pytest.raises(WeightsError, match="the vocabulary has 263 tokens, but the embedding 100 rows"):
        load(loader, small, cache_memory=2**20)


@LOADERS
def test_a_cache_too_small_for_one_block_is_refused(tmp_path, loader):
    path = tiny_llama_gguf(tmp_path / "tiny.gguf", TINY)
    with pytest.raises(WeightsError, match="cache_memory 100 is less than one block of"):
        load(loader, path, cache_memory=100)


def test_loading_reports_its_progress(tmp_path):
    path = tiny_llama_gguf(tmp_path / "tiny.gguf", TINY, "Q8_0")
    for loader in (load_runner, load_reference_runner):
        seen = []
        loader(
            EngineConfig(str(path), cache_memory=2**20), lambda *progress, seen=seen: seen.append(progress)
        )
        loaded, totals = zip(*seen, strict=True)
        assert sorted(set(loaded)) == list(loaded)
        assert set(totals) == {loaded[-1]}


def test_a_tree_of_parameters_names_what_is_not_there():
    root = tree({"a.0.weight": 1, "a.1.weight": 2, "b.weight": 3})
    assert [item.weight for item in root.a] == [1, 2]
    assert root.b.weight == 3
    with pytest.raises(AttributeError, match=r"no parameter 'bias' here; there are .*weight"):
        root.b.bias  # noqa: B018
    with pytest.raises(ValueError, match=r"number 0 of this list is missing"):
        tree({"a.1.weight": 2})
