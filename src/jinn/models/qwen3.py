"""Qwen3: each head of q and k is normed before it is rotated, and `head_dim` is free of the hidden size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from jinn.models import layers
from jinn.models.decoder import ATTENTION, Decoder, decoder_fields
from jinn.models.fields import Fields
from jinn.models.parameters import ParameterSpec
from jinn.ops.protocol import Context, Ops, Value


@dataclass(frozen=True, kw_only=True)
class Qwen3(Decoder):
    """The dense models."""

    family = "qwen3"

    @classmethod
    def from_config(cls, fields: Fields) -> Self:
        biased = ATTENTION if fields.boolean("attention_bias", False) else ()
        return cls(**decoder_fields(fields), biased_linears=biased)

    def attention_parameters(self) -> dict[str, ParameterSpec]:
        norm = ParameterSpec((self.head_dim,))
        norms = {"self_attn.q_norm.weight": norm, "self_attn.k_norm.weight": norm}
        return {**super().attention_parameters(), **norms}

    def attention(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        q, k, v = ops.linear(x, [params.q_proj, params.k_proj, params.v_proj], ctx)
        q = self.norm(ops, q, params.q_norm)  # one weight [head_dim] for all heads
        k = self.norm(ops, k, params.k_norm)
        return layers.attend(ops, params, q, k, v, ctx, self.head_dim, self.rope)
