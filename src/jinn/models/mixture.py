"""A mixture of experts in place of a block's MLP: its config, its parameters, and how files lay them out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jinn.models.fields import ConfigError, Fields
from jinn.models.parameters import Layout, Origin, ParameterSpec
from jinn.ops.protocol import RouteSpec

# A config that lies must not make lists of its sizes before they are compared with the tensors.
MAX_EXPERTS, MAX_EXPERT_SIZE = 65536, 2**20

NUM_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The experts of all sparse blocks; a shared expert, where there is one, takes every token."""

    num_experts: int
    intermediate_size: int
    route: RouteSpec
    dense_layers: frozenset[int] = frozenset()  # blocks that have an MLP instead
    shared_expert: str | None = None  # its name in checkpoints
    shared_size: int = 0  # its intermediate size
    has_shared_gate: bool = False
    has_correction_bias: bool = False

    def parameters(self, hidden_size: int) -> dict[str, ParameterSpec]:
        """Of one block, by the rest of their keys: the router, the stacked experts and the shared one."""
        inner, chosen = self.intermediate_size, self.route.num_experts_per_tok
        inward = ParameterSpec((self.num_experts, inner, hidden_size), "expert", chosen)
        outward = ParameterSpec((self.num_experts, hidden_size, inner), "expert", chosen)
        specs = {
            "mlp.gate.weight": ParameterSpec((self.num_experts, hidden_size)),
            "mlp.experts.gate_proj.weight": inward,
            "mlp.experts.up_proj.weight": inward,
            "mlp.experts.down_proj.weight": outward,
        }
        if self.has_correction_bias:
            specs["mlp.gate.e_score_correction_bias"] = ParameterSpec((self.num_experts,))
        if self.shared_expert:
            specs.update(mlp_parameters(f"mlp.{self.shared_expert}", hidden_size, self.shared_size))
        if self.has_shared_gate:
            specs["mlp.shared_expert_gate.weight"] = ParameterSpec((1, hidden_size))
        return specs


def mlp_parameters(name: str, hidden_size: int, intermediate_size: int) -> dict[str, ParameterSpec]:
    """The three matrices of a SwiGLU MLP."""
    return {
        f"{name}.gate_proj.weight": ParameterSpec((intermediate_size, hidden_size), "column"),
        f"{name}.up_proj.weight": ParameterSpec((intermediate_size, hidden_size), "column"),
        f"{name}.down_proj.weight": ParameterSpec((hidden_size, intermediate_size), "row"),
    }


def route_spec(fields: Fields, num_experts: int, is_renormalized: bool) -> RouteSpec:
    """The plain router: the softmax of all scores. Raises ConfigError naming the field."""
    num_chosen = fields.integer("num_experts_per_tok", high=num_experts)
    return RouteSpec(num_chosen, is_renormalized=fields.boolean("norm_topk_prob", is_renormalized))


def num_experts_of(fields: Fields) -> int:
    """The config's number of experts, under any of the names it has had."""
    name = next((name for name in NUM_EXPERTS if fields.has(name)), NUM_EXPERTS[-1])
    return fields.integer(name, high=MAX_EXPERTS)


def expert_size_of(fields: Fields) -> int:
    """The config's intermediate size of an expert."""
    return fields.integer("moe_intermediate_size", high=MAX_EXPERT_SIZE)


def has_experts(fields: Fields) -> bool:
    """Whether the config is that of a mixture."""
    return any(fields.has(name) for name in NUM_EXPERTS)


def step_dense_layers(fields: Fields, num_layers: int) -> frozenset[int]:
    """The dense layers of Qwen's configs: those listed, and all but every `decoder_sparse_step`-th."""
    listed = fields.integers("mlp_only_layers")
    step = fields.integer("decoder_sparse_step", 1)
    return frozenset(i for i in range(num_layers) if i in listed or (i + 1) % step)


def hf_expert_origin(name: str, spec: ParameterSpec, layout: Layout) -> Origin:
    """Where a Hugging Face folder keeps experts: a tensor each, or all stacked and gate above up."""
    experts, part, _ = name.rsplit(".", 2)
    if f"{experts}.gate_up_proj" not in layout.tensors:
        return Origin(f"{experts}.{{}}.{part}.weight", num_experts=spec.shape[0])
    if part == "down_proj":
        return Origin(f"{experts}.down_proj")
    return _half_of_gate_up(f"{experts}.gate_up_proj", part, spec)


def gguf_expert_origin(name: str, spec: ParameterSpec, layout: Layout) -> Origin:
    """Where GGUF keeps experts: stacked, and in some files gate above up."""
    for part in ("gate", "up"):
        both = name.replace(f"ffn_{part}_exps", "ffn_gate_up_exps")
        if both != name and both in layout.tensors:
            return _half_of_gate_up(both, f"{part}_proj", spec)
    return Origin(name)


def _half_of_gate_up(name: str, part: str, spec: ParameterSpec) -> Origin:
    num_experts, rows, cols = spec.shape
    first = rows if part == "up_proj" else 0
    chosen = np.arange(first, first + rows, dtype=np.int32)
    return Origin(name, shape=(num_experts, 2 * rows, cols), rows=chosen)


def check_groups(num_experts: int, route: RouteSpec) -> None:
    """Raise ConfigError where experts cannot be chosen from such groups."""
    size = num_experts // route.num_groups
    if num_experts % route.num_groups or (size < 2 and route.num_groups > 1):
        raise ConfigError(
            f"config field n_group {route.num_groups} does not part {num_experts} experts into groups"
        )
    if route.num_experts_per_tok > route.num_chosen_groups * size:
        raise ConfigError(
            f"config field num_experts_per_tok {route.num_experts_per_tok} exceeds the experts of "
            f"{route.num_chosen_groups} groups of {size}"
        )
