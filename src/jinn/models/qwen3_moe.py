"""Qwen3-MoE: Qwen3's attention, and in every block a mixture of experts without a shared one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from jinn.models import layers
from jinn.models.decoder import ATTENTION, decoder_fields
from jinn.models.fields import ConfigError, Fields
from jinn.models.mixture import MAX_EXPERTS, expert_origins, mixture_parameters
from jinn.models.parameters import Origin, ParameterSpec
from jinn.models.qwen3 import Qwen3
from jinn.ops.protocol import Ops, RouteSpec, Value
from jinn.weights.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Qwen3Moe(Qwen3):
    """All blocks are sparse."""

    num_experts: int
    moe_intermediate_size: int
    route_spec: RouteSpec

    family = "qwen3_moe"

    @classmethod
    def from_config(cls, fields: Fields) -> Self:
        if fields.integer("decoder_sparse_step", 1) != 1 or fields.get("mlp_only_layers"):
            raise ConfigError(
                "config fields decoder_sparse_step and mlp_only_layers are not supported but as 1 and []"
            )
        # transformers 5 writes num_local_experts
        name = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
        num_experts = fields.integer(name, high=MAX_EXPERTS)
        spec = RouteSpec(
            fields.integer("num_experts_per_tok", high=num_experts),
            # GGUF has no key for it: its Qwen3 models are all renormalized
            is_renormalized=fields.boolean("norm_topk_prob", bool(fields.keys)),
        )
        biased = ATTENTION if fields.boolean("attention_bias", False) else ()
        return cls(
            **decoder_fields(fields),
            biased_linears=biased,
            num_experts=num_experts,
            moe_intermediate_size=fields.integer("moe_intermediate_size"),
            route_spec=spec,
        )

    def mlp_parameters(self) -> dict[str, ParameterSpec]:
        return mixture_parameters(
            self.num_experts,
            self.route_spec.num_experts_per_tok,
            self.hidden_size,
            self.moe_intermediate_size,
        )

    def origins(self, checkpoint: Checkpoint) -> dict[str, Origin]:
        origins = super().origins(checkpoint)
        if checkpoint.kind == "hf":
            origins.update(expert_origins(checkpoint, self.parameters()))
        return origins

    def mlp(self, ops: Ops[Value], params: Any, x: Value) -> Value:
        return layers.mixture(ops, params, x, self.route_spec)
