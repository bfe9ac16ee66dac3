"""Qwen3-MoE: Qwen3's attention, and mixtures of experts without a shared one, in every block or in some."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from jinn.models.decoder import ATTENTION, decoder_fields
from jinn.models.fields import Fields
from jinn.models.mixture import Mixture, expert_size_of, num_experts_of, route_spec, step_dense_layers
from jinn.models.qwen3 import Qwen3


@dataclass(frozen=True, kw_only=True)
class Qwen3Moe(Qwen3):
    """Experts are renormalized where the config says so; GGUF has no key for it, since all are."""

    family = "qwen3_moe"

    @classmethod
    def from_config(cls, fields: Fields) -> Self:
        common, num_experts = decoder_fields(fields), num_experts_of(fields)
        mixture = Mixture(
            num_experts=num_experts,
            intermediate_size=expert_size_of(fields),
            route=route_spec(fields, num_experts, is_renormalized=fields.is_gguf),
            dense_layers=step_dense_layers(fields, common["num_hidden_layers"]),
        )
        biased = ATTENTION if fields.boolean("attention_bias", False) else ()
        return cls(**common, biased_linears=biased, mixture=mixture)
