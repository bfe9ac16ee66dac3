"""The families jinn knows, by the name a checkpoint gives. Each is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, cast

from jinn.models.config import config_of, hf_fields
from jinn.models.fields import ConfigError, Fields
from jinn.models.model import Model
from jinn.weights.checkpoint import Checkpoint

FAMILIES = {
    "llama": "llama.Llama",
    "qwen2": "qwen2.Qwen2",
    "qwen3": "qwen3.Qwen3",
    "qwen3_moe": "qwen3_moe.Qwen3Moe",
    "qwen3moe": "qwen3_moe.Qwen3Moe",
    "qwen3_next": "qwen3_next.Qwen3Next",
    "qwen3next": "qwen3_next.Qwen3Next",
    "qwen3_5": "qwen3_5.Qwen35",
    "qwen3_5_text": "qwen3_5.Qwen35",
    "qwen3_5_moe": "qwen3_5.Qwen35",
    "qwen3_5_moe_text": "qwen3_5.Qwen35",
    "qwen35": "qwen3_5.Qwen35",
    "qwen35moe": "qwen3_5.Qwen35",
    "deepseek_v3": "deepseek_v3.DeepseekV3",
    "deepseek2": "deepseek_v3.DeepseekV3",
}
"""The module in jinn.models and the class, by Hugging Face's model_type or GGUF's general.architecture."""


def model_of(checkpoint: Checkpoint) -> Model:
    """The model whose weights these are. Raises ConfigError naming the architecture and what is supported."""
    try:
        family = family_of(checkpoint.architecture)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from None
    return family(config_of(checkpoint))


def model_of_config(config: Mapping[str, Any]) -> Model:
    """The model of a config.json. Raises ConfigError as `model_of`."""
    return family_of(config.get("model_type"))(hf_fields(config))


def family_of(architecture: Any) -> Callable[[Fields], Model]:
    """What makes a family's model of a config. Raises ConfigError naming what is supported."""
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"architecture {architecture!r} is not supported; supported are {supported}")
    module, _, name = FAMILIES[architecture].partition(".")
    family = getattr(import_module(f"jinn.models.{module}"), name)
    return cast(Callable[[Fields], Model], family.from_config)
