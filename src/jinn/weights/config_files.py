"""Carries a model's config between config.json and GGUF's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from jinn.models.config import GGUF_KEYS, config_of
from jinn.models.decoder import Decoder
from jinn.models.fields import Fields
from jinn.models.generation import GGUF_NAMES, generation_defaults
from jinn.models.rope import plain_frequencies
from jinn.weights.checkpoint import Checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.gguf import MetadataValue

_FLOATS = ("rms_norm_eps", "rope_theta", "factor", "attention_factor", "beta_fast", "beta_slow")
_ROPE = (
    "rope_type",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
)
_SHOWN = ("vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias")  # by GGUF's tensors
_LLAMA3 = "llama3"  # GGUF keeps it worked out, as a tensor


@dataclass(frozen=True, slots=True)
class FamilyNames:
    """What files call a family, and what config.json says of all its models."""

    architecture: str  # GGUF's general.architecture
    model_type: str
    model_class: str
    constants: Mapping[str, Any] = field(default_factory=dict)


FAMILY_NAMES = {
    "llama": FamilyNames("llama", "llama", "LlamaForCausalLM"),
    "qwen2": FamilyNames("qwen2", "qwen2", "Qwen2ForCausalLM"),
    "qwen3": FamilyNames("qwen3", "qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": FamilyNames(
        "qwen3moe",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
}


def names_of(model: Decoder) -> FamilyNames:
    """Raises WeightsError for a family that cannot be converted."""
    names = FAMILY_NAMES.get(model.family)
    if names is None:
        raise WeightsError(f"models of family {model.family!r} cannot be converted")
    return names


def gguf_metadata(checkpoint: Checkpoint, model: Decoder) -> dict[str, MetadataValue]:
    """GGUF's keys for a Hugging Face folder's config, but those of its tokenizer and of its file type."""
    fields, names = config_of(checkpoint), names_of(model)
    for name, value in names.constants.items():
        if fields.has(name) and fields.get(name) != value:
            raise WeightsError(
                f"{checkpoint.path}: GGUF has no key for config field {name}, so that it must be {value!r}"
            )
    metadata: dict[str, MetadataValue] = {
        "general.architecture": names.architecture,
        "general.name": checkpoint.path.resolve().name,
        "general.quantization_version": 2,
    }
    values = _values(fields, model)
    if values.get("rope_type") in (None, "default", _LLAMA3):
        values = {name: value for name, value in values.items() if name not in _ROPE}
    for name, key in GGUF_KEYS.items():
        if values.get(name) is not None:
            metadata[f"{names.architecture}.{key}"] = _gguf_value(name, values[name])
    metadata[f"{names.architecture}.vocab_size"] = model.vocab_size
    if "head_dim" in values:
        metadata[f"{names.architecture}.attention.value_length"] = values["head_dim"]
    for name, key in GGUF_NAMES.items():
        if name in checkpoint.generation_config:
            metadata[key] = checkpoint.generation_config[name]
    return metadata


def rope_divisors(checkpoint: Checkpoint, model: Decoder) -> npt.NDArray[np.float32] | None:
    """float32 [head_dim / 2], which GGUF keeps as rope_freqs.weight; None where it has no such tensor."""
    fields = config_of(checkpoint)
    if fields.get("rope_type") != _LLAMA3:
        return None
    scaled = np.array(model.rope.inv_freq)
    plain = plain_frequencies(fields.number("rope_theta", 10000.0), 2 * len(scaled))
    return (plain / scaled).astype(np.float32)


def hf_config(checkpoint: Checkpoint, model: Decoder, dtype: str) -> dict[str, Any]:
    """config.json for a GGUF's metadata; `dtype` is PyTorch's name. Raises WeightsError."""
    fields, names = config_of(checkpoint), names_of(model)
    values = _values(fields, model)
    config: dict[str, Any] = {
        "architectures": [names.model_class],
        "model_type": names.model_type,
        "hidden_act": "silu",
        **names.constants,
    }
    for name in (*GGUF_KEYS, *_SHOWN):
        if values.get(name) is not None and name not in (*_ROPE, "rotary_dim", "attention_multiplier"):
            config[name] = values[name]
    config["rope_scaling"] = _rope_scaling(fields, model)
    config["torch_dtype"] = dtype
    return config | _token_ids(checkpoint)


def hf_generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """generation_config.json for a GGUF's metadata."""
    defaults = generation_defaults(checkpoint)
    config = {name: getattr(defaults, name) for name in GGUF_NAMES if getattr(defaults, name) is not None}
    if config:
        config["do_sample"] = config.get("temperature") != 0.0
    ids = _token_ids(checkpoint)
    if defaults.eos_token_ids:
        ids["eos_token_id"] = list(defaults.eos_token_ids)
    return config | ids


def _values(fields: Fields, model: Decoder) -> dict[str, Any]:
    """Under Hugging Face's names: what the file says, or else what the model has taken for it."""
    values = {name: _shortest(fields.get(name)) for name in (*GGUF_KEYS, *_SHOWN)}
    given = {name: getattr(model, name, None) if value is None else value for name, value in values.items()}
    return given | {"rotary_dim": 2 * len(model.rope.inv_freq)}


def _shortest(value: Any) -> Any:
    """A float32 number as the shortest decimal that it is the float32 of: 1e-06, not 9.99999997475e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _gguf_value(name: str, value: Any) -> MetadataValue:
    return float(value) if name in _FLOATS else value


def _rope_scaling(fields: Fields, model: Decoder) -> dict[str, Any] | None:
    if fields.has("rope_divisors"):
        return _llama3_scaling(
            np.array(fields.get("rope_divisors")), model, fields.number("rope_theta", 10000.0)
        )
    kind = fields.get("rope_type")
    if kind in (None, "none", "default"):
        return None
    scaling = {name: fields.get(name) for name in _ROPE if fields.has(name)}
    if kind == "yarn":
        scaling["attention_factor"] = model.rope.attention_factor
    return scaling


def _llama3_scaling(divisors: npt.NDArray[Any], model: Decoder, theta: float) -> dict[str, Any]:
    """The numbers of Llama 3's rule that give these divisors: 1 and 4 as published, and a power of two.

    Raises WeightsError where none do.
    """
    factor = float(divisors.max())
    wavelengths = 2 * np.pi / plain_frequencies(theta, 2 * len(divisors)).astype(np.float64)
    for original in (1 << power for power in range(6, 21)):
        blend = np.clip((original / wavelengths - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - blend) / factor + blend), divisors, rtol=1e-4):
            return {
                "rope_type": _LLAMA3,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise WeightsError(
        "tensor 'rope_freqs.weight': its numbers are not Llama 3's, for which config.json has fields"
    )


def _token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    keys = {
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "padding_token_id",
    }
    found = {name: checkpoint.config_source.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: token_id for name, token_id in found.items() if token_id is not None}
