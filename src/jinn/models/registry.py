"""The families jinn knows, by the name a checkpoint gives."""

from __future__ import annotations

from jinn.models.fields import ConfigError
from jinn.models.llama import Llama
from jinn.models.model import Model
from jinn.weights.checkpoint import Checkpoint

FAMILIES = {
    "llama": Llama,
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
    return family.from_checkpoint(checkpoint)
