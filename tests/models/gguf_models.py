"""Writes a saved model as GGUF as llama.cpp's converter does: names of the gguf package, q and k permuted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tiny import add_tensor, add_tokenizer, permute_rope_rows, tiny_vocab, write_gguf

ARCHITECTURES = {MODEL_ARCH_NAMES[arch]: arch for arch in MODEL_ARCH}


def gguf_of(folder: Path, path: Path, format_name: str = "F32") -> Path:
    """Matrices in `format_name`, all else in float32; with a tokenizer where the vocabulary has room."""
    config = json.loads((folder / "config.json").read_text())
    architecture = config["model_type"].replace("_", "")
    writer = GGUFWriter(path, architecture)
    _add_metadata(writer, config)
    if config["vocab_size"] >= len(tiny_vocab()):
        add_tokenizer(writer, config["vocab_size"])
    names = get_tensor_name_map(ARCHITECTURES[architecture], config["num_hidden_layers"])
    tensors = {name: t.float().numpy() for name, t in load_file(folder / "model.safetensors").items()}
    for name, values in _stacked(tensors, config.get("num_local_experts", 0)).items():
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = permute_rope_rows(values.reshape(len(values), -1), heads).reshape(values.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        is_float32 = values.ndim == 1 or name.endswith("mlp.gate.weight")
        add_tensor(writer, gguf_name, values, "F32" if is_float32 else format_name)
    if config["rope_parameters"]["rope_type"] == "llama3":
        add_tensor(writer, "rope_freqs.weight", _llama3_divisors(folder), "F32")
    return write_gguf(writer, path)


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


def _add_metadata(writer: GGUFWriter, config: dict) -> None:
    rope = config["rope_parameters"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if "num_local_experts" in config:
        writer.add_expert_count(config["num_local_experts"])
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


def _llama3_divisors(folder: Path) -> np.ndarray:
    config = AutoConfig.from_pretrained(folder)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    return (config.rope_parameters["rope_theta"] ** -(pairs / config.head_dim) / scaled).numpy()
