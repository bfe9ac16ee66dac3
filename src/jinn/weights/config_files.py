"""Carries a model's config between config.json and GGUF's metadata."""

from __future__ import annotations

from collections.abc import Mapping
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
from jinn.weights.family_files import Config, files_of
from jinn.weights.gguf import MetadataValue

_SCALING = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
_LLAMA3 = "llama3"  # GGUF has it worked out, as a tensor
_DEFAULT_THETA = 10000.0


def gguf_metadata(
    name: str, model: Decoder, fields: Fields, sampling: Mapping[str, Any]
) -> dict[str, MetadataValue]:
    """GGUF's keys for a config, but those of its tokenizer and of its file type.

    `sampling` is generation_config.json. Raises WeightsError where the config says what GGUF has no key for.
    """
    files = files_of(model)
    for constant, value in files.constants.items():
        if fields.has(constant) and fields.get(constant) != value:
            raise WeightsError(f"GGUF has no key for config field {constant}, so that it must be {value!r}")
    config = _config(model, fields)
    keys = {GGUF_KEYS[name]: value for name, value in config.items() if name in GGUF_KEYS}
    keys["attention.value_length"] = config["head_dim"]
    keys["rope.dimension_count"] = 2 * len(model.rope.inv_freq)
    keys["vocab_size"] = model.vocab_size
    keys |= _gguf_scaling(fields) | files.gguf_keys(model, fields)
    keys["block_count"] += model.has_mtp and files.has_gguf_prediction
    metadata: dict[str, MetadataValue] = {
        "general.architecture": files.architecture,
        "general.name": name,
        "general.quantization_version": 2,
    }
    metadata |= {
        f"{files.architecture}.{key}": _array(value) for key, value in keys.items() if value is not None
    }
    return metadata | {key: sampling[field] for field, key in GGUF_NAMES.items() if field in sampling}


def rope_divisors(checkpoint: Checkpoint, model: Decoder) -> npt.NDArray[np.float32] | None:
    """float32 [head_dim / 2], which GGUF keeps as rope_freqs.weight; None where it has no such tensor."""
    fields = config_of(checkpoint)
    if fields.get("rope_type") != _LLAMA3:
        return None
    scaled = np.array(model.rope.inv_freq)
    plain = plain_frequencies(fields.number("rope_theta", _DEFAULT_THETA), 2 * len(scaled))
    divisors: npt.NDArray[np.float32] = (plain / scaled).astype(np.float32)
    return divisors


def hf_config(checkpoint: Checkpoint, model: Decoder, dtype: str) -> Config:
    """config.json for a GGUF's metadata; `dtype` is PyTorch's name. Raises WeightsError."""
    fields, files = config_of(checkpoint), files_of(model)
    return {
        "architectures": [files.model_class],
        "model_type": files.model_type,
        "hidden_act": "silu",
        **_config(model, fields),
        **files.constants,
        "rope_scaling": _hf_scaling(fields, model),
        "torch_dtype": dtype,
        **_token_ids(checkpoint),
    }


def hf_generation_config(checkpoint: Checkpoint) -> Config:
    """generation_config.json for a GGUF's metadata."""
    defaults = generation_defaults(checkpoint)
    config = {name: getattr(defaults, name) for name in GGUF_NAMES if getattr(defaults, name) is not None}
    if config:
        config["do_sample"] = config.get("temperature") != 0.0
    ids = _token_ids(checkpoint)
    if defaults.eos_token_ids:
        ids["eos_token_id"] = list(defaults.eos_token_ids)
    return config | ids


def _config(model: Decoder, fields: Fields) -> Config:
    """Under Hugging Face's names, all but the rotary scaling."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "rms_norm_eps": _shortest(model.rms_norm_eps),
        "rope_theta": _shortest(fields.number("rope_theta", _DEFAULT_THETA)),
        "tie_word_embeddings": model.tie_word_embeddings,
        **files_of(model).describe(model),
    }


def _shortest(number: float) -> float:
    """A float32 number as the shortest decimal that it is the float32 of: 1e-06, not 9.99999997475e-07."""
    return float(str(np.float32(number)))


def _array(value: Any) -> MetadataValue:
    if isinstance(value, list):
        return np.array(value, np.bool_ if isinstance(value[0], bool) else np.int32)
    result: MetadataValue = value
    return result


def _gguf_scaling(fields: Fields) -> Config:
    kind = fields.get("rope_type")
    if kind in (None, "default", _LLAMA3):
        return {}
    keys = {GGUF_KEYS[name]: float(fields.get(name)) for name in _SCALING if fields.has(name)}
    name = "original_max_position_embeddings"
    keys[GGUF_KEYS[name]] = fields.integer(name, fields.integer("max_position_embeddings"))
    return {GGUF_KEYS["rope_type"]: kind, **keys}


def _hf_scaling(fields: Fields, model: Decoder) -> Config | None:
    if fields.has("rope_divisors"):
        return _llama3_scaling(np.array(fields.get("rope_divisors")), fields)
    kind = fields.get("rope_type")
    if kind in (None, "none", "default"):
        return None
    scaling = {name: fields.get(name) for name in _SCALING if fields.has(name)}
    if fields.has("yarn_log_multiplier"):  # a tenth of both, which are the same
        scaling["mscale"] = scaling["mscale_all_dim"] = 10 * fields.number("yarn_log_multiplier")
    scaling |= {name: _shortest(value) for name, value in scaling.items() if isinstance(value, float)}
    if kind == "yarn" and fields.has("attention_multiplier"):
        scaling["attention_factor"] = model.rope.attention_factor  # which has the multiplier in it
    return {"rope_type": kind, **scaling}


def _llama3_scaling(divisors: npt.NDArray[Any], fields: Fields) -> Config:
    """The numbers of Llama 3's rule that give these divisors: 1 and 4 as published, and a power of two.

    Raises WeightsError where none do.
    """
    factor = float(divisors.max())
    frequencies = plain_frequencies(fields.number("rope_theta", _DEFAULT_THETA), 2 * len(divisors))
    wavelengths = 2 * np.pi / frequencies.astype(np.float64)
    for original in (1 << power for power in range(6, 21)):
        blend = np.clip((original / wavelengths - 1) / 3, 0, 1)
        if np.allclose(1 / ((1 - blend) / factor + blend), divisors, rtol=1e-4):
            return {
                "rope_type": _LLAMA3,
                "factor": _shortest(factor),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise WeightsError(
        "tensor 'rope_freqs.weight' does not follow Llama 3's rule, for which there are fields"
    )


def _token_ids(checkpoint: Checkpoint) -> Config:
    keys = {
        "bos_token_id": "bos_token_id",
        "eos_token_id": "eos_token_id",
        "pad_token_id": "padding_token_id",
    }
    found = {name: checkpoint.config_source.get(f"tokenizer.ggml.{key}") for name, key in keys.items()}
    return {name: token_id for name, token_id in found.items() if token_id is not None}
