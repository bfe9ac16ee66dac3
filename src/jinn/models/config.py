"""A checkpoint's config under Hugging Face's names, whichever format holds it."""

from __future__ import annotations

from collections.abc import Mapping
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
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rotary_dim": "rope.dimension_count",
    "rope_theta": "rope.freq_base",
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "attention_multiplier": "rope.scaling.attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


def config_of(checkpoint: Checkpoint) -> Fields:
    """The fields of its config. Raises ConfigError where what should tell a field is not there."""
    return gguf_fields(checkpoint) if checkpoint.kind == "gguf" else hf_fields(checkpoint.config_source)


def hf_fields(config: Mapping[str, Any]) -> Fields:
    """Of config.json; what `rope_parameters` (or, in older files, `rope_scaling`) says stands beside them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"config field rope_parameters must be an object, not {rope!r}")
    given = {name: value for name, value in rope.items() if value is not None}
    if "type" in given:
        given.setdefault("rope_type", given.pop("type"))
    return Fields({**config, **given})


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
    return Fields({**checkpoint.config_source, **shown}, keys)
