"""What a checkpoint says about generating: where answers end, and how it would have them sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jinn.models.fields import ConfigError, Fields
from jinn.text.endings import END_TEXTS
from jinn.weights.checkpoint import Checkpoint

GGUF_NAMES = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_GGUF_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_GGUF_CONTROL = 3  # of tokenizer.ggml.token_type


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Ids that end an answer, and sampling settings that hold where a request gives none (None: unset)."""

    eos_token_ids: tuple[int, ...]
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def generation_defaults(checkpoint: Checkpoint) -> GenerationDefaults:
    """From the JSON configs, or GGUF's metadata. Raises ConfigError naming the field."""
    if checkpoint.kind == "gguf":
        return _from_gguf(checkpoint.config_source)
    config = {**checkpoint.config_source, **checkpoint.generation_config}
    is_sampled = checkpoint.generation_config.get("do_sample", True)
    settings = {name: config.get(name) for name in GGUF_NAMES if name in checkpoint.generation_config}
    if is_sampled is False:
        settings["temperature"] = 0.0
    return _checked(config.get("eos_token_id"), settings)


def _from_gguf(metadata: Mapping[str, Any]) -> GenerationDefaults:
    named = [metadata[key] for key in _GGUF_END_KEYS if key in metadata]
    tokens, types = _list(metadata, "tokenizer.ggml.tokens"), _list(metadata, "tokenizer.ggml.token_type")
    known = [tokens.index(text) for text in END_TEXTS if text in tokens]  # as llama.cpp does
    controls = [token_id for token_id in known if types[token_id : token_id + 1] == [_GGUF_CONTROL]]
    return _checked(named + controls, {name: metadata.get(key) for name, key in GGUF_NAMES.items()})


def _list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(key)
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    return value if isinstance(value, list) else []


def _checked(ends: Any, settings: dict[str, Any]) -> GenerationDefaults:
    token_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for token_id in token_ids:
        Fields({"eos_token_id": token_id}).integer("eos_token_id", low=0)
    given = {name: value for name, value in settings.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"generation field {name} must be a number, not {value!r}")
    if "top_k" in given:
        given["top_k"] = int(given["top_k"])
    return GenerationDefaults(tuple(dict.fromkeys(token_ids)), **given)
