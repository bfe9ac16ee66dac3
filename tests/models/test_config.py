"""A config or checkpoint that jinn cannot run is refused in one line that names what is wrong."""

from __future__ import annotations

import contextlib
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
from jinn.models.config import GGUF_KEYS, hf_fields
from jinn.models.deepseek_v3 import DeepseekV3
from jinn.models.fields import ConfigError, Fields
from jinn.models.llama import Llama
from jinn.models.parameters import tree
from jinn.models.qwen3 import Qwen3
from jinn.models.qwen3_5 import Qwen35
from jinn.models.qwen3_next import Qwen3Next
from jinn.models.registry import model_of
from jinn.models.rope import rope_of
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError
from tiny import TinyLlama, tiny_llama_folder, tiny_llama_gguf

from .transformers_models import HYBRID, LLAMA3_ROPE, MLA, SHARED_EXPERT, SMALL

LOADERS = pytest.mark.parametrize("loader", [load_runner, load_reference_runner], ids=["native", "reference"])
TINY = TinyLlama()


def load(loader, path, **settings):
    return loader(EngineConfig(str(path), num_threads=1, **settings), lambda loaded, total: None)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [None, 0, -1, 2**31, "64", 64.0, True, [64], float("nan")])
def test_a_wrong_size_is_named(field, value):
    with pytest.raises(ConfigError, match=f"config field {field} "):
        Llama.from_config(hf_fields({**SMALL, field: value}))


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
        ("use_sliding_window", True),
        ("rope_parameters", [1]),
    ],
)
def test_a_wrong_field_is_named(field, value):
    name = {"num_key_value_heads": "num_attention_heads"}.get(field, field)
    with pytest.raises(ConfigError, match=f"config field {name} "):
        Llama.from_config(hf_fields({**SMALL, field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("linear_num_key_heads", 0),
        ("linear_num_key_heads", "2"),
        ("linear_num_value_heads", 5),
        ("linear_num_value_heads", 2**30),
        ("linear_key_head_dim", 0),
        ("linear_value_head_dim", 2**20),
        ("linear_value_head_dim", None),
        ("linear_conv_kernel_dim", 1),
        ("linear_conv_kernel_dim", 10**6),
        ("layer_types", ["linear_attention"]),
        ("layer_types", [["full_attention"]] * 4),
        ("layer_types", "full_attention"),
        ("layer_types", ["sliding_attention"] * 4),
        ("full_attention_interval", 0),
        ("partial_rotary_factor", 2.0),
        ("partial_rotary_factor", 0.2),
        ("partial_rotary_factor", "half"),
        ("shared_expert_intermediate_size", 0),
        ("num_experts", 2**30),
        ("num_experts_per_tok", 9),
        ("moe_intermediate_size", 2**30),
        ("norm_topk_prob", 1),
        ("mlp_only_layers", 3),
        ("decoder_sparse_step", -1),
        ("attn_output_gate", False),
        ("text_config", [1]),
    ],
)
def test_a_wrong_field_of_a_hybrid_is_named(field, value):
    config = {**SMALL, **HYBRID, **SHARED_EXPERT, field: value}
    with pytest.raises(ConfigError, match=f"config field {field} "):
        Qwen3Next.from_config(hf_fields(config))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qk_nope_head_dim", 0),
        ("qk_rope_head_dim", 3),
        ("qk_rope_head_dim", 2**30),
        ("v_head_dim", None),
        ("kv_lora_rank", -1),
        ("q_lora_rank", 0),
        ("rope_interleave", "yes"),
        ("first_k_dense_replace", -1),
        ("n_routed_experts", None),
        ("n_shared_experts", 0),
        ("n_group", 3),
        ("n_group", 8),
        ("topk_group", 5),
        ("num_experts_per_tok", 5),
        ("routed_scaling_factor", 0),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
    ],
)
def test_a_wrong_field_of_latent_attention_is_named(field, value):
    name = {"n_routed_experts": "num_experts"}.get(field, field)
    with pytest.raises(ConfigError, match=f"config field {name} "):
        DeepseekV3.from_config(hf_fields({**SMALL, **MLA, field: value}))


def test_weights_that_are_not_renormalized_are_refused_for_qwen3_5():
    config = {**SMALL, **HYBRID, **SHARED_EXPERT, "norm_topk_prob": False}
    with pytest.raises(ConfigError, match="config field norm_topk_prob False is not supported"):
        Qwen35.from_config(hf_fields(config))


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "phi3", "deepseek_v32", "mamba"])
def test_a_family_that_is_not_there_is_refused_by_name(tmp_path, family):
    path = tiny_llama_folder(tmp_path / "hf", TINY)
    config = {**json.loads((path / "config.json").read_text()), "model_type": family}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigError, match=f"architecture '{family}' is not supported; supported are deepseek"
    ):
        load(load_runner, path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_theta": 1e300}, "rope_theta"),
        ({"rope_type": "dynamic"}, "rope_type"),
        ({"rope_type": 3}, "rope_type"),
        ({"factor": None}, "factor"),
        ({"factor": 0.5}, "factor"),
        ({"rope_type": "linear", "factor": 1e300}, "factor"),
        ({"rope_type": "yarn", "factor": None}, "factor"),
        ({"rope_type": "yarn", "factor": float("inf")}, "factor"),
        ({"rope_type": "yarn", "beta_fast": 0}, "beta_fast"),
        ({"rope_type": "yarn", "beta_slow": "1"}, "beta_slow"),
        ({"rope_type": "yarn", "truncate": 0}, "truncate"),
        ({"rope_type": "yarn", "attention_factor": -1.0}, "attention_factor"),
        ({"rope_type": "yarn", "mscale": "1", "mscale_all_dim": 1}, "mscale"),
        ({"low_freq_factor": 0}, "low_freq_factor"),
        ({"high_freq_factor": None}, "high_freq_factor"),
        ({"original_max_position_embeddings": "8192"}, "original_max_position_embeddings"),
        ({"high_freq_factor": 1.0, "low_freq_factor": 1.0}, "high_freq_factor"),
    ],
)
def test_a_wrong_rope_is_named(change, name):
    with pytest.raises(ConfigError, match=f"config field {name} "):
        Llama.from_config(hf_fields({**SMALL, "rope_parameters": {**LLAMA3_ROPE, **change}}))


SCALED_ROPES = {
    "llama3 by 4": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama3 by 32": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn with its factor of attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    "yarn with mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn with one mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0},
    "yarn with its own ramp": {"rope_type": "yarn", "factor": 2.5, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn with a whole ramp": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1e9, "beta_slow": 1e-9},
    "yarn with a step": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 8.0},
    "yarn between pairs": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    "yarn by 1": {"rope_type": "yarn", "factor": 1.0},
}


@pytest.mark.parametrize("name", SCALED_ROPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scaled_frequencies_are_those_of_transformers(name, head_dim):
    rope = {**SCALED_ROPES[name], "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=head_dim, rope_parameters=rope)
    expected, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    old = {("type" if key == "rope_type" else key): value for key, value in rope.items()}
    for source in ({"rope_parameters": rope}, {"rope_scaling": old}):
        ours = rope_of(hf_fields(source), head_dim)
        np.testing.assert_allclose(ours.inv_freq, expected.numpy(), rtol=2e-6)
        assert ours.attention_factor == pytest.approx(attention_factor)


def test_the_long_context_recipe_of_qwen3():
    """The ramp of head_dim 128 and theta 1e6 goes from pair 23 to 40; 4 * 32768 positions are allowed."""
    recipe = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {**SMALL, "head_dim": 128, "rope_theta": 1e6, "rope_scaling": recipe}
    config["max_position_embeddings"] = 40960
    model = Qwen3.from_config(hf_fields(config))
    plain = np.array(rope_of(hf_fields({"rope_theta": 1e6}), 128).inv_freq)
    ratios = plain / np.array(model.rope.inv_freq)
    assert np.abs(ratios[:24] - 1).max() < 1e-6 < ratios[24] - 1
    assert np.abs(ratios[40:] - 4).max() < 1e-6 < 4 - ratios[39]
    assert model.rope.attention_factor == pytest.approx(1.1386, abs=1e-4)
    assert model.max_position_embeddings == 131072


def test_ggufs_factor_of_attention_multiplies_that_of_yarn():
    """As in llama.cpp, which knows yarn's own of 0.1 ln(factor) + 1 without being told."""
    keys = {name: f"qwen3.{key}" for name, key in GGUF_KEYS.items()}
    metadata = {
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 64,
        "qwen3.rope.scaling.attn_factor": 1.5,
    }
    rope = rope_of(Fields(metadata, keys), 64)
    assert rope.attention_factor == pytest.approx(1.5 * (0.1 * np.log(4) + 1))
    with pytest.raises(ConfigError, match=r"config field qwen3\.rope\.scaling\.factor must be"):
        rope_of(Fields({**metadata, "qwen3.rope.scaling.factor": "4"}, keys), 64)


def test_a_rope_of_lies_raises_nothing_else():
    """Values that no model has must not end in an overflow or a division by zero."""
    values = (2.0, 1e-300, 1e300, 2**31 - 1, 1, 1e6)
    names = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale")
    rng = np.random.default_rng(0)
    for _ in range(300):
        rope = {name: values[rng.integers(len(values))] for name in names}
        rope |= {"rope_type": "yarn", "mscale_all_dim": rope["mscale"], "max_position_embeddings": 64}
        with contextlib.suppress(ConfigError):
            assert np.isfinite(rope_of(hf_fields({"rope_parameters": rope}), 16).inv_freq).all()


def test_old_and_new_rope_fields_mean_the_same():
    def rope(**config):
        return rope_of(hf_fields(config), 64)

    assert rope(rope_theta=1e6) == rope(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert rope(rope_theta=1e6) == rope(rope_theta=1e6, rope_scaling=None)
    assert rope(rope_theta=1e6) != rope()


@pytest.mark.parametrize("name", ["mamba", "gemma3_text", "gpt_oss", "phi3", "qwen2_vl"])
def test_an_unknown_architecture_is_named_with_what_is_supported(tmp_path, name):
    folder = tiny_llama_folder(tmp_path, TINY)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": name}))
    with (
        open_checkpoint(folder) as checkpoint,
        pytest.raises(ConfigError, match=f"'{name}' is not supported; supported are .*llama, .*qwen3"),
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
