"""What files call each family, and what its configs say that other families' do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinn.models.decoder import ATTENTION, MLP, Decoder
from jinn.models.deepseek_v3 import SIGMOID_GATING, DeepseekV3
from jinn.models.fields import Fields
from jinn.models.mixture import Mixture
from jinn.models.qwen3_next import Qwen3Next
from jinn.weights.errors import WeightsError

Config = dict[str, Any]

_GGUF_INTERVAL = 4  # of full attention, where a file does not list its layers
_MROPE_SECTIONS = (11, 11, 10)


@dataclass(frozen=True, slots=True)
class FamilyFiles:
    """A family in files: GGUF's architecture, Hugging Face's model_type, and its class in transformers.

    `constants` are config.json's fields that are the same in all its models, as far as GGUF can tell.
    `describe` gives the fields that other families lack; `gguf_keys` GGUF's keys that are no such field, or
    have another value, after the architecture's name.
    """

    architecture: str
    model_type: str
    model_class: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    describe: Callable[[Any], Config] = lambda model: {}
    gguf_keys: Callable[[Any, Fields], Config] = lambda model, fields: {}
    has_gguf_prediction: bool = False  # llama.cpp reads a multi-token prediction module


def files_of(model: Decoder) -> FamilyFiles:
    """Raises WeightsError for a family that cannot be converted."""
    name = f"{model.family} moe" if model.family == "qwen3_5" and model.mixture else model.family
    if name not in FAMILY_FILES:
        raise WeightsError(f"models of family {model.family!r} cannot be converted")
    return FAMILY_FILES[name]


def _attention_bias(model: Decoder) -> Config:
    return {"attention_bias": ATTENTION[0] in model.biased_linears}


def _biases(model: Decoder) -> Config:
    return {**_attention_bias(model), "mlp_bias": MLP[0] in model.biased_linears}


def _experts(mixture: Mixture) -> Config:
    config = {
        "num_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.route.num_experts_per_tok,
        "moe_intermediate_size": mixture.intermediate_size,
    }
    return config | (
        {"shared_expert_intermediate_size": mixture.shared_size} if mixture.shared_expert else {}
    )


def _sparse(model: Decoder) -> Config:
    return {**_attention_bias(model), **(_experts(model.mixture) if model.mixture else {})}


def _hybrid(model: Qwen3Next) -> Config:
    spec = model.state_spec
    return {
        **_sparse(model),
        "linear_num_key_heads": spec.num_key_heads,
        "linear_num_value_heads": spec.num_value_heads,
        "linear_key_head_dim": spec.key_dim,
        "linear_value_head_dim": spec.value_dim,
        "linear_conv_kernel_dim": spec.conv_kernel,
        "layer_types": list(model.layer_types),
        "partial_rotary_factor": 2 * len(model.rope.inv_freq) / model.head_dim,
    }


def _hybrid_keys(model: Qwen3Next, fields: Fields) -> Config:
    spec = model.state_spec
    keys: Config = {
        "ssm.inner_size": spec.num_value_heads * spec.value_dim,
        "full_attention_interval": _GGUF_INTERVAL,
    }
    is_recurrent = [kind == "linear_attention" for kind in model.layer_types]
    if is_recurrent != [(i + 1) % _GGUF_INTERVAL > 0 for i in range(len(is_recurrent))]:
        keys["attention.recurrent_layers"] = is_recurrent
    return keys


def _qwen35_keys(model: Qwen3Next, fields: Fields) -> Config:
    sections = fields.integers("mrope_section") or _MROPE_SECTIONS
    keys = {**_hybrid_keys(model, fields), "rope.dimension_sections": [*sections, 0]}
    return keys | ({"nextn_predict_layers": 1} if model.has_mtp else {})


def _latent(model: DeepseekV3) -> Config:
    mixture = _mixture_of(model)
    return {
        "num_key_value_heads": model.num_attention_heads,
        "head_dim": model.qk_rope_head_dim,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "attention_bias": bool(model.biased_linears),
        "first_k_dense_replace": len(mixture.dense_layers),
        "n_routed_experts": mixture.num_experts,
        "n_shared_experts": mixture.shared_size // mixture.intermediate_size,
        "num_experts_per_tok": mixture.route.num_experts_per_tok,
        "moe_intermediate_size": mixture.intermediate_size,
        "n_group": mixture.route.num_groups,
        "topk_group": mixture.route.num_chosen_groups,
        "norm_topk_prob": mixture.route.is_renormalized,
        "routed_scaling_factor": mixture.route.scaling,
    }


def _latent_keys(model: DeepseekV3, fields: Fields) -> Config:
    keys: Config = {
        "attention.head_count_kv": 1,
        "attention.key_length": model.kv_lora_rank + model.qk_rope_head_dim,
        "attention.value_length": model.kv_lora_rank,
        "attention.key_length_mla": model.head_dim,
        "attention.value_length_mla": model.v_head_dim,
        "expert_count": _mixture_of(model).num_experts,
        "expert_gating_func": SIGMOID_GATING,
    }
    if fields.has("mscale_all_dim"):
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * fields.number("mscale_all_dim")
    return keys


def _mixture_of(model: DeepseekV3) -> Mixture:
    if model.mixture is None:
        raise WeightsError("a DeepSeek-V3 without experts cannot be converted")
    return model.mixture


_SPARSE_CONSTANTS = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
_LATENT_CONSTANTS = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
FAMILY_FILES = {
    "llama": FamilyFiles("llama", "llama", "LlamaForCausalLM", describe=_biases),
    "qwen2": FamilyFiles("qwen2", "qwen2", "Qwen2ForCausalLM"),
    "qwen3": FamilyFiles("qwen3", "qwen3", "Qwen3ForCausalLM", describe=_attention_bias),
    "qwen3_moe": FamilyFiles(
        "qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", _SPARSE_CONSTANTS, describe=_sparse
    ),
    "qwen3_next": FamilyFiles(
        "qwen3next", "qwen3_next", "Qwen3NextForCausalLM", _SPARSE_CONSTANTS, _hybrid, _hybrid_keys
    ),
    "qwen3_5": FamilyFiles(
        "qwen35",
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        {"attn_output_gate": True},
        _hybrid,
        _qwen35_keys,
        has_gguf_prediction=True,
    ),
    "qwen3_5 moe": FamilyFiles(
        "qwen35moe",
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        {"attn_output_gate": True},
        _hybrid,
        _qwen35_keys,
        has_gguf_prediction=True,
    ),
    "deepseek_v3": FamilyFiles(
        "deepseek2", "deepseek_v3", "DeepseekV3ForCausalLM", _LATENT_CONSTANTS, _latent, _latent_keys
    ),
}
