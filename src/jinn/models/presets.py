"""The shapes of published models, as config.json has them, without multi-token prediction modules.

Sources: the models' own config.json files; the sizes that these leave to defaults are written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinn.models.fields import ConfigError
from jinn.models.model import Model
from jinn.models.registry import model_of_config


def preset_names() -> tuple[str, ...]:
    """Published names, family by family, small to large."""
    return tuple(PRESETS)


def preset_config(name: str, num_hidden_layers: int | None = None) -> dict[str, Any]:
    """The config of a shape, by its name in any case, cut to its first layers where a number is given.

    Raises ConfigError for a name that is not there, and for more layers than there are.
    """
    published = {known.lower(): config for known, config in PRESETS.items()}.get(name.lower())
    if published is None:
        raise ConfigError(f"shape {name!r} is not known; there are {', '.join(PRESETS)}")
    config = dict(published)
    if num_hidden_layers is not None:
        if not 1 <= num_hidden_layers <= config["num_hidden_layers"]:
            raise ConfigError(
                f"{name} has 1 to {config['num_hidden_layers']} layers, not {num_hidden_layers}"
            )
        config["num_hidden_layers"] = num_hidden_layers
    return config


def preset(name: str, num_hidden_layers: int | None = None) -> Model:
    """The model of a shape. Raises ConfigError as `preset_config`, and for a family that jinn lacks."""
    return model_of_config(preset_config(name, num_hidden_layers))


def _smollm2(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, theta: float) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_attention(hidden, layers, heads, kv_heads, 64),
        "intermediate_size": inner,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "rope_theta": theta,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, theta: float, positions: int
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_attention(hidden, layers, heads, kv_heads, 128),
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "rope_theta": theta,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
    }


def _llama3(hidden: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _llama(hidden, layers, heads, 8, inner, 128256, 500000.0, 131072) | {"rope_scaling": scaling}


def _qwen2_5(hidden: int, layers: int, heads: int, kv_heads: int, inner: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
    }


_QWEN3 = {
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}


def _qwen3(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, *, tied: bool = False, **changes: Any
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **_attention(hidden, layers, heads, kv_heads, 128),
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
        **_QWEN3,
        **changes,
    }


def _qwen3_moe(
    hidden: int, layers: int, heads: int, inner: int, expert_inner: int, **changes: Any
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_attention(hidden, layers, heads, 4, 128),
        "intermediate_size": inner,
        "tie_word_embeddings": False,
        **_QWEN3,
        **_experts(128, 8, expert_inner),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        **changes,
    }


def _qwen3_next() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **_attention(2048, 48, 16, 2, 256),
        "intermediate_size": 5120,  # of dense layers, of which there are none
        "tie_word_embeddings": False,
        **_QWEN3,
        **_LONG_CONTEXT,
        **_linear_attention(32),
        **_experts(512, 10, 512),
        "shared_expert_intermediate_size": 512,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


_LONG_CONTEXT = {"rope_theta": 10000000.0, "partial_rotary_factor": 0.25, "max_position_embeddings": 262144}
_QWEN3_5 = {
    "vocab_size": 248320,
    **_LONG_CONTEXT,
    "rms_norm_eps": 1e-6,
    "attn_output_gate": True,
    "eos_token_id": 248044,
    "pad_token_id": 248044,
}


def _qwen3_5(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, value_heads: int, *, tied: bool = False
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        **_attention(hidden, layers, heads, kv_heads, 256),
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
        **_QWEN3_5,
        **_linear_attention(value_heads),
    }


def _qwen3_5_moe(
    hidden: int, layers: int, heads: int, value_heads: int, experts: int, chosen: int, expert_inner: int
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        **_attention(hidden, layers, heads, 2, 256),
        "tie_word_embeddings": False,
        **_QWEN3_5,
        **_linear_attention(value_heads),
        **_experts(experts, chosen, expert_inner),
        "shared_expert_intermediate_size": expert_inner,
    }


def _deepseek_v3() -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": False,
        "intermediate_size": 18432,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "vocab_size": 129280,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _attention(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "attention_bias": False,
    }


def _linear_attention(value_heads: int) -> dict[str, Any]:
    return {
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    }


def _experts(experts: int, chosen: int, inner: int) -> dict[str, Any]:
    return {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": inner}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "SmolLM2-135M": _smollm2(576, 30, 9, 3, 1536, 100000.0),
    "SmolLM2-360M": _smollm2(960, 32, 15, 5, 2560, 100000.0),
    "SmolLM2-1.7B": _smollm2(2048, 24, 32, 32, 8192, 130000.0),
    "Llama-2-7B": _llama(4096, 32, 32, 32, 11008, 32000, 10000.0, 4096),
    "Llama-2-70B": _llama(8192, 80, 64, 8, 28672, 32000, 10000.0, 4096),
    "Llama-3.1-8B": _llama3(4096, 32, 32, 14336),
    "Llama-3.1-70B": _llama3(8192, 80, 64, 28672),
    "Llama-3.1-405B": _llama3(16384, 126, 128, 53248),
    "Qwen2.5-7B": _qwen2_5(3584, 28, 28, 4, 18944),
    "Qwen2.5-32B": _qwen2_5(5120, 64, 40, 8, 27648),
    "Qwen2.5-72B": _qwen2_5(8192, 80, 64, 8, 29568),
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 6144, tied=True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728, tied=True),
    "Qwen3-4B-2507": _qwen3(
        2560, 36, 32, 8, 9728, tied=True, rope_theta=5000000.0, max_position_embeddings=262144
    ),
    "Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288),
    "Qwen3-14B": _qwen3(5120, 40, 40, 8, 17408),
    "Qwen3-32B": _qwen3(5120, 64, 64, 8, 25600),
    "Qwen3-30B-A3B": _qwen3_moe(2048, 48, 32, 6144, 768),
    "Qwen3-30B-A3B-2507": _qwen3_moe(
        2048, 48, 32, 6144, 768, rope_theta=10000000.0, max_position_embeddings=262144
    ),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 94, 64, 12288, 1536),
    "Qwen3-235B-A22B-2507": _qwen3_moe(
        4096, 94, 64, 12288, 1536, rope_theta=5000000.0, max_position_embeddings=262144
    ),
    "Qwen3-Next-80B-A3B": _qwen3_next(),
    "Qwen3.5-0.8B": _qwen3_5(1024, 24, 8, 2, 3584, 16, tied=True),
    "Qwen3.5-2B": _qwen3_5(2048, 24, 8, 2, 6144, 16, tied=True),
    "Qwen3.5-4B": _qwen3_5(2560, 32, 16, 4, 9216, 32, tied=True),
    "Qwen3.5-9B": _qwen3_5(4096, 32, 16, 4, 12288, 32),
    "Qwen3.5-27B": _qwen3_5(5120, 64, 24, 4, 17408, 48),
    "Qwen3.5-35B-A3B": _qwen3_5_moe(2048, 40, 16, 32, 256, 8, 512),
    "Qwen3.5-122B-A10B": _qwen3_5_moe(3072, 48, 32, 64, 256, 8, 1024),
    "Qwen3.5-397B-A17B": _qwen3_5_moe(4096, 60, 32, 64, 512, 10, 1024),
    "DeepSeek-V3": _deepseek_v3(),
}
