"""Writes a saved model as GGUF as llama.cpp's converter does: names of the gguf package, q and k permuted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    ExpertGatingFuncType,
    GGUFWriter,
    RopeScalingType,
    get_tensor_name_map,
)
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tiny import add_tensor, add_tokenizer, permute_rope_rows, tiny_vocab, write_gguf

from .transformers_models import HYBRID_FAMILIES

ARCHITECTURES = {MODEL_ARCH_NAMES[arch]: arch for arch in MODEL_ARCH}


NOT_IN_GGUF = ("qwen3_moe as they are", "qwen3_moe some sparse", "deepseek_v3 plain")
"""Variants that it has no keys for: weights not renormalized, some blocks dense, another rope style."""


def gguf_of(
    folder: Path, path: Path, format_name: str = "F32", *, is_old: bool = False, has_gate_up: bool = False
) -> Path:
    """Matrices in `format_name`, all else in float32; with a tokenizer where the vocabulary has room.

    `is_old` writes as the converters of before did: fused DeltaNet projections, latents of k and v together.
    `has_gate_up` has an expert's gate above its up in one tensor.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = GGUF_NAMES.get(config["model_type"]) or config["model_type"].replace("_", "")
    writer = GGUFWriter(path, architecture)
    _add_metadata(writer, config)
    ADD_METADATA.get(config["model_type"], lambda writer, config, is_old: None)(writer, config, is_old)
    if config["vocab_size"] >= len(tiny_vocab()):
        add_tokenizer(writer, config["vocab_size"])
    num_layers = config["num_hidden_layers"]
    names = get_tensor_name_map(ARCHITECTURES[architecture], num_layers + 1)
    tensors = {name: t.float().numpy() for name, t in load_file(folder / "model.safetensors").items()}
    if "mtp.fc.weight" in tensors:
        writer.kv_data[0][f"{architecture}.block_count"].value = num_layers + 1
        writer.add_nextn_predict_layers(1)
    for prefix, renamed in PREDICTION.items():
        tensors = {n.replace(prefix, f"model.layers.{num_layers}.{renamed}"): t for n, t in tensors.items()}
    tensors = _stacked(tensors, num_experts_of(config))
    for hf_name, hf_values in (_with_gate_up(tensors) if has_gate_up else tensors).items():
        for name, values in _converted(hf_name, hf_values, config, is_old):
            gguf_name = OWN_NAMES.get(name.split(".", 3)[-1])
            if gguf_name is not None:
                gguf_name = f"blk.{name.split('.')[2]}.{gguf_name}"
            else:
                gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            is_float32 = values.ndim == 1 or name.endswith(FLOAT32)
            add_tensor(writer, gguf_name, values, "F32" if is_float32 else format_name)
    if config["rope_parameters"]["rope_type"] == "llama3":
        add_tensor(writer, "rope_freqs.weight", _llama3_divisors(folder), "F32")
    return write_gguf(writer, path)


def _converted(name: str, values: np.ndarray, config: dict, is_old: bool) -> list[tuple[str, np.ndarray]]:
    """What the converter makes of a tensor: its name for the name map, and its values."""
    family = config["model_type"]
    if family == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        values = permute_rope_rows(values.reshape(len(values), -1), heads).reshape(values.shape)
    if family in HYBRID_FAMILIES:
        return _converted_hybrid(name, values, config, is_old)
    if name.endswith("e_score_correction_bias"):
        return [(name.replace("_correction_bias", "_correction.bias"), values)]
    if name.endswith("kv_b_proj.weight") and not is_old:
        heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
        per_head = values.reshape(heads, -1, config["kv_lora_rank"])
        k, v = per_head[:, :nope], per_head[:, nope:]
        return [
            (name.replace("kv_b_proj", "k_b_proj"), np.ascontiguousarray(k.swapaxes(1, 2))),
            (name.replace("kv_b_proj", "v_b_proj"), np.ascontiguousarray(v)),
        ]
    return [(name, values)]


def _converted_hybrid(
    name: str, values: np.ndarray, config: dict, is_old: bool
) -> list[tuple[str, np.ndarray]]:
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    group, key_dim = value_heads // key_heads, config["linear_key_head_dim"]
    value_dim = config["linear_value_head_dim"]
    is_tiled = config["model_type"] != "qwen3_next"

    def tiled(heads: np.ndarray) -> np.ndarray:
        parts = heads.reshape(key_heads, group, -1, *heads.shape[1:])
        return parts.swapaxes(0, 1).reshape(heads.shape) if is_tiled else heads

    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return [(name, values + 1)]
    if name.endswith("A_log"):
        return [(name, -np.exp(tiled(values)))]
    if name.endswith("dt_bias"):
        return [(name.replace("dt_bias", "dt_proj.bias"), tiled(values))]
    if name.endswith(("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight")):
        return [(name, tiled(values))]
    if name.endswith("out_proj.weight") and "linear_attn" in name:
        return [(name, np.ascontiguousarray(tiled(values.T).T))]
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        first = 2 * key_heads * key_dim
        values = values.reshape(len(values), -1)
        return [(name, np.concatenate((values[:first], tiled(values[first:]))))]
    if name.endswith("in_proj_qkvz.weight") and not is_old:
        groups = values.reshape(key_heads, -1, values.shape[1])
        cuts = np.cumsum([key_dim, key_dim, group * value_dim])
        q, k, v, z = (part.reshape(-1, values.shape[1]) for part in np.split(groups, cuts, axis=1))
        return [
            (name.replace("qkvz", "qkv"), np.concatenate((q, k, v))),
            (name.replace("qkvz", "z"), z),
        ]
    return [(name, values)]


def _stacked(tensors: dict[str, np.ndarray], num_experts: int) -> dict[str, np.ndarray]:
    """The tensors, with those of experts as one for all."""
    stacked = {}
    for name, values in tensors.items():
        if ".experts." not in name:
            stacked[name] = values
        elif ".experts.0." in name:
            parts = [tensors[name.replace(".experts.0.", f".experts.{e}.")] for e in range(num_experts)]
            stacked[name.replace(".experts.0.", ".experts.")] = np.stack(parts)
    return stacked


def _with_gate_up(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    whole = {name: values for name, values in tensors.items() if not name.endswith(EXPERT_INPUTS)}
    for name, gate in tensors.items():
        if name.endswith(EXPERT_INPUTS[0]):
            up = tensors[name.replace("gate_proj", "up_proj")]
            whole[name.replace("gate_proj", "gate_up_proj")] = np.concatenate((gate, up), axis=1)
    return whole


def num_experts_of(config: dict) -> int:
    """Of a saved config; 0 for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((config[name] for name in names if config.get(name)), 0)


def _add_metadata(writer: GGUFWriter, config: dict) -> None:
    rope = config["rope_parameters"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    if config.get("intermediate_size"):
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if num_experts := num_experts_of(config):
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def _add_hybrid_metadata(writer: GGUFWriter, config: dict, is_old: bool) -> None:
    value_heads = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(value_heads)
    writer.add_ssm_inner_size(value_heads * config["linear_value_head_dim"])
    writer.add_full_attention_interval(4)
    is_linear = [kind == "linear_attention" for kind in config["layer_types"]]
    if is_linear != [(i + 1) % 4 > 0 for i in range(len(is_linear))]:
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", is_linear)
    writer.add_rope_dimension_count(int(config["head_dim"] * 0.25))
    if config["model_type"] != "qwen3_next":
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    if "shared_expert_intermediate_size" in config and config.get("num_experts"):
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _add_latent_metadata(writer: GGUFWriter, config: dict, is_old: bool) -> None:
    rope_dim, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
    head_dim, rope = config["qk_nope_head_dim"] + rope_dim, config["rope_parameters"]
    sizes = {
        "attention.head_count_kv": config["num_attention_heads"] if is_old else 1,
        "attention.key_length": head_dim if is_old else latent + rope_dim,
        "attention.value_length": config["v_head_dim"] if is_old else latent,
    }
    for key, size in sizes.items():
        writer.kv_data[0][f"{writer.arch}.{key}"].value = size
    if not is_old:
        writer.add_key_length_mla(head_dim)
        writer.add_value_length_mla(config["v_head_dim"])
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(latent)
    writer.add_rope_dimension_count(rope_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    if "mscale_all_dim" in rope:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


GGUF_NAMES = {"qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe", "deepseek_v3": "deepseek2"}
EXPERT_INPUTS = ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight")
OWN_NAMES = {
    "mlp.experts.gate_up_proj.weight": "ffn_gate_up_exps.weight",
    "linear_attn.in_proj_qkvz.weight": "ssm_in.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "shared_head_norm.weight": "nextn.shared_head_norm.weight",
}
"""Those that the name map has otherwise or not at all."""
PREDICTION = {
    "mtp.fc.": "eh_proj.",
    "mtp.pre_fc_norm_embedding.": "enorm.",
    "mtp.pre_fc_norm_hidden.": "hnorm.",
    "mtp.norm.": "shared_head_norm.",
    "mtp.layers.0.": "",
}
FLOAT32 = ("mlp.gate.weight", "conv1d.weight", "shared_expert_gate.weight")
ADD_METADATA = {**dict.fromkeys(HYBRID_FAMILIES, _add_hybrid_metadata), "deepseek_v3": _add_latent_metadata}


def _llama3_divisors(folder: Path) -> np.ndarray:
    config = AutoConfig.from_pretrained(folder)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    return (config.rope_parameters["rope_theta"] ** -(pairs / config.head_dim) / scaled).numpy()
