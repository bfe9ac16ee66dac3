"""A mixture of experts in place of a block's MLP: its parameters, and how checkpoints lay them out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jinn.models.parameters import Origin, ParameterSpec
from jinn.weights.checkpoint import Checkpoint

MAX_EXPERTS = 65536  # a config that lies must not make lists of its sizes before they are compared


def mixture_parameters(
    num_experts: int, num_experts_per_tok: int, hidden_size: int, intermediate_size: int
) -> dict[str, ParameterSpec]:
    """The router and the stacked experts, by the rest of their keys."""
    inward = ParameterSpec((num_experts, intermediate_size, hidden_size), "expert", num_experts_per_tok)
    outward = ParameterSpec((num_experts, hidden_size, intermediate_size), "expert", num_experts_per_tok)
    return {
        "mlp.gate.weight": ParameterSpec((num_experts, hidden_size)),
        "mlp.experts.gate_proj.weight": inward,
        "mlp.experts.up_proj.weight": inward,
        "mlp.experts.down_proj.weight": outward,
    }


def expert_origins(checkpoint: Checkpoint, specs: Mapping[str, ParameterSpec]) -> dict[str, Origin]:
    """Where a Hugging Face folder keeps the experts: a tensor each, or all stacked and gate above up."""
    return {
        name: _expert_origin(checkpoint, name, spec)
        for name, spec in specs.items()
        if spec.parallel == "expert"
    }


def _expert_origin(checkpoint: Checkpoint, name: str, spec: ParameterSpec) -> Origin:
    experts, part, _ = name.rsplit(".", 2)
    if f"{experts}.gate_up_proj" not in checkpoint.tensors:
        return Origin(f"{experts}.{{}}.{part}.weight", num_experts=spec.shape[0])
    if part == "down_proj":
        return Origin(f"{experts}.down_proj")
    rows = spec.shape[1]
    first = rows if part == "up_proj" else 0
    order = np.arange(first, first + rows, dtype=np.int32)
    return Origin(f"{experts}.gate_up_proj", order, num_rows=2 * rows)
