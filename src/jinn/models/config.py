"""A checkpoint's config under Hugging Face's names, whichever format holds it."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from jinn.models.fields import ConfigError, Fields
from jinn.weights.checkpoint import Checkpoint
from jinn.weights.quantize import dequantize

# GGUF's key of each field, after the architecture's name. Under yarn_ its converter writes what transformers
# means by these fields, and so they are read here; llama.cpp leaves them out for qwen3.
GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "norm_topk_prob": "expert_weights_norm",
    "routed_scaling_factor": "expert_weights_scale",
    "expert_gating_func": "expert_gating_func",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_head_dim": "attention.key_length_mla",
    "v_head_dim": "attention.value_length_mla",
    "value_length": "attention.value_length",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "linear_inner_size": "ssm.inner_size",
    "full_attention_interval": "full_attention_interval",
    "recurrent_layers": "attention.recurrent_layers",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rotary_dim": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "attention_multiplier": "rope.scaling.attn_factor",
    "yarn_log_multiplier": "rope.scaling.yarn_log_multiplier",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


def config_of(checkpoint: Checkpoint) -> Fields:
    """The fields of its config. Raises ConfigError where what should tell a field is not there."""
    if checkpoint.kind == "gguf":
        return gguf_fields(checkpoint)
    return hf_fields(checkpoint.config_source, checkpoint.tensors)


def hf_fields(config: Mapping[str, Any], tensors: Container[str] = ()) -> Fields:
    """Of config.json; what `text_config` and `rope_parameters` (or `rope_scaling`) say stands beside them."""
    config = {**config, **_object(config, "text_config")}
    rope = _object(config, "rope_parameters") or _object(config, "rope_scaling")
    given = {name: value for name, value in rope.items() if value is not None}
    if "type" in given:
        given.setdefault("rope_type", given.pop("type"))
    return Fields({**config, **given}, tensors=tensors)


def _object(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A config's nested object; empty where there is none."""
    value = config.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"config field {name} must be an object, not {value!r}")
    return value or {}


def gguf_fields(checkpoint: Checkpoint) -> Fields:
    """Of GGUF's metadata, and those that only its tensors show."""
    tensors = checkpoint.tensors
    if "token_embd.weight" not in tensors:
        raise ConfigError(f"{checkpoint.path}: tensor 'token_embd.weight' is missing")
    shown = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }
    if "rope_freqs.weight" in tensors:
        info = tensors["rope_freqs.weight"]
        shown["rope_divisors"] = dequantize(checkpoint.data(info.name), info.format, info.shape).tolist()
    keys = {name: f"{checkpoint.architecture}.{key}" for name, key in GGUF_KEYS.items()}
    return Fields({**checkpoint.config_source, **shown}, keys, tensors)
