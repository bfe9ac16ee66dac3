"""The families jinn knows, by the name a checkpoint gives."""

from __future__ import annotations

from collections.abc import Callable

from jinn.models.config import config_of
from jinn.models.deepseek_v3 import DeepseekV3
from jinn.models.fields import ConfigError, Fields
from jinn.models.llama import Llama
from jinn.models.model import Model
from jinn.models.qwen2 import Qwen2
from jinn.models.qwen3 import Qwen3
from jinn.models.qwen3_5 import Qwen35
from jinn.models.qwen3_moe import Qwen3Moe
from jinn.models.qwen3_next import Qwen3Next
from jinn.weights.checkpoint import Checkpoint

FAMILIES: dict[str, Callable[[Fields], Model]] = {
    "llama": Llama.from_config,
    "qwen2": Qwen2.from_config,
    "qwen3": Qwen3.from_config,
    "qwen3_moe": Qwen3Moe.from_config,
    "qwen3moe": Qwen3Moe.from_config,
    "qwen3_next": Qwen3Next.from_config,
    "qwen3next": Qwen3Next.from_config,
    "qwen3_5": Qwen35.from_config,
    "qwen3_5_text": Qwen35.from_config,
    "qwen3_5_moe": Qwen35.from_config,
    "qwen3_5_moe_text": Qwen35.from_config,
    "qwen35": Qwen35.from_config,
    "qwen35moe": Qwen35.from_config,
    "deepseek_v3": DeepseekV3.from_config,
    "deepseek2": DeepseekV3.from_config,
}


def model_of(checkpoint: Checkpoint) -> Model:
    """The model whose weights these are. Raises ConfigError naming the architecture and what is supported."""
    family = FAMILIES.get(checkpoint.architecture)
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise ConfigError(
            f"{checkpoint.path}: architecture {checkpoint.architecture!r} is not supported; "
            f"supported are {supported}"
        )
    return family(config_of(checkpoint))
