"""DeepSeek-V3: attention over one latent per token (MLA), and sigmoid routing within groups of experts.

Attention is absorbed, in prefill and in decode alike: a query is carried into the latent space (`k_b_proj`),
where all heads share one key, the normed latent and a rotated part, and the mixed latents are carried back
(`v_b_proj`). arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from jinn.models.decoder import MAX_HEAD_DIM, Decoder, decoder_fields, prediction_mark
from jinn.models.fields import ConfigError, Fields
from jinn.models.mixture import Mixture, check_groups, expert_size_of, num_experts_of
from jinn.models.names import layer_and_part
from jinn.models.parameters import Layout, Origin, ParameterSpec
from jinn.models.rope import magnitude
from jinn.ops.protocol import Context, KVSpec, Ops, RouteSpec, Value

LATENT_NORM_EPS = 1e-6  # whatever the config says
MAX_DIM = 4096  # of a head
SIGMOID_GATING = 2  # GGUF's expert_gating_func
# Hugging Face's names of the prediction module's parts, which is the layer after the last
PREDICTION = {
    "mtp.fc": "eh_proj",
    "mtp.pre_fc_norm_embedding": "enorm",
    "mtp.pre_fc_norm_hidden": "hnorm",
    "mtp.norm": "shared_head.norm",
}


@dataclass(frozen=True, kw_only=True)
class DeepseekV3(Decoder):
    """`head_dim` is that of queries before they are carried over: `qk_nope_head_dim + qk_rope_head_dim`."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    softmax_scale: float

    family = "deepseek_v3"

    @classmethod
    def from_config(cls, fields: Fields) -> Self:
        fields.supported("moe_layer_freq", 1)
        fields.supported("topk_method", "noaux_tc")
        fields.supported("scoring_func", "sigmoid")
        fields.supported("expert_gating_func", SIGMOID_GATING)
        rope_dim = _rope_dim(fields)
        nope_dim, value_dim = _head_dims(fields, rope_dim)
        common = decoder_fields(fields, head_dim=nope_dim + rope_dim, rotary_dim=rope_dim)
        num_layers = common["num_hidden_layers"]
        rope = replace(common["rope"], is_interleaved=fields.boolean("rope_interleave", True))
        if fields.is_gguf:  # counts YaRN's factor into the softmax scale alone
            rope = replace(rope, attention_factor=1.0)
        biased = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
        return cls(
            **{**common, "num_key_value_heads": 1, "rope": rope},
            biased_linears=biased if fields.boolean("attention_bias", False) else (),
            mixture=_mixture(fields, num_layers),
            has_mtp=prediction_mark("gguf" if fields.is_gguf else "hf", num_layers) in fields.tensors,
            q_lora_rank=fields.integer("q_lora_rank") if fields.has("q_lora_rank") else None,
            kv_lora_rank=fields.integer("kv_lora_rank", high=MAX_HEAD_DIM),
            qk_nope_head_dim=nope_dim,
            qk_rope_head_dim=rope_dim,
            v_head_dim=value_dim,
            softmax_scale=_softmax_scale(fields, nope_dim + rope_dim),
        )

    def attention_parameters(self) -> dict[str, ParameterSpec]:
        hidden, latent, num_heads = self.hidden_size, self.kv_lora_rank, self.num_attention_heads
        q_size = num_heads * self.head_dim
        specs = {
            "self_attn.kv_a_proj_with_mqa.weight": ParameterSpec((latent + self.qk_rope_head_dim, hidden)),
            "self_attn.kv_a_layernorm.weight": ParameterSpec((latent,)),
            "self_attn.k_b_proj.weight": ParameterSpec((num_heads, latent, self.qk_nope_head_dim), "column"),
            "self_attn.v_b_proj.weight": ParameterSpec((num_heads, self.v_head_dim, latent), "column"),
            "self_attn.o_proj.weight": ParameterSpec((hidden, num_heads * self.v_head_dim), "row"),
        }
        if self.q_lora_rank is None:
            return {"self_attn.q_proj.weight": ParameterSpec((q_size, hidden), "column"), **specs}
        return {
            "self_attn.q_a_proj.weight": ParameterSpec((self.q_lora_rank, hidden)),
            "self_attn.q_a_layernorm.weight": ParameterSpec((self.q_lora_rank,)),
            "self_attn.q_b_proj.weight": ParameterSpec((q_size, self.q_lora_rank), "column"),
            **specs,
        }

    def hf_origin(self, name: str, spec: ParameterSpec, layout: Layout) -> Origin:
        layer = f"model.layers.{self.num_hidden_layers}"
        module, _, leaf = name.rpartition(".")
        if module in PREDICTION:
            return Origin(f"{layer}.{PREDICTION[module]}.{leaf}")
        name = name.replace("mtp.layers.0", layer)
        return self._latent_origin(name) or super().hf_origin(name, spec, layout)

    def gguf_origin(self, name: str, spec: ParameterSpec, layout: Layout) -> Origin:
        if ".self_attn." in name:
            layer, _ = layer_and_part(name, self.num_hidden_layers)
            together = f"blk.{layer}.attn_kv_b.weight"
            if together in layout.tensors:  # of files of before
                origin = self._latent_origin(name)
                if origin is not None:
                    return replace(origin, name=together)
        return super().gguf_origin(name, spec, layout)

    def _latent_origin(self, name: str) -> Origin | None:
        """Of `k_b_proj` or `v_b_proj` in a tensor that has, for each head, rows of k and then rows of v."""
        together = name.replace(".k_b_proj.", ".kv_b_proj.").replace(".v_b_proj.", ".kv_b_proj.")
        nope, per_head = self.qk_nope_head_dim, self.qk_nope_head_dim + self.v_head_dim
        shape = (self.num_attention_heads * per_head, self.kv_lora_rank)
        rows = np.arange(per_head, dtype=np.int32)
        if ".k_b_proj." in name:
            return Origin(together, shape=shape, rows=rows[:nope], is_transposed=True)
        if ".v_b_proj." in name:
            return Origin(together, shape=shape, rows=rows[nope:])
        return None

    def kv_spec(self) -> KVSpec:
        return KVSpec(1, self.kv_lora_rank + self.qk_rope_head_dim, self.kv_lora_rank)

    def attention(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        num_heads, rope_dim = params.k_b_proj.weight.shape[0], self.qk_rope_head_dim
        q, compressed = self._projections(ops, params, x, ctx)
        q_nope, q_rope = ops.split_heads(q, num_heads, (self.qk_nope_head_dim, rope_dim))
        k_nope, k_rope = ops.split_heads(compressed, 1, (self.kv_lora_rank, rope_dim))
        k_nope = ops.rms_norm(k_nope, params.kv_a_layernorm, LATENT_NORM_EPS)
        q_rope = ops.rope(q_rope, ctx, self.rope, num_heads)
        k_rope = ops.rope(k_rope, ctx, self.rope, 1)
        q = ops.join_heads([ops.head_linear(q_nope, params.k_b_proj), q_rope], num_heads)
        k = ops.join_heads([k_nope, k_rope], 1)
        mixed = ops.attention(q, k, k_nope, ctx, self.kv_spec(), self.softmax_scale)
        (out,) = ops.linear(ops.head_linear(mixed, params.v_b_proj), [params.o_proj], ctx)
        return out

    def _projections(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> tuple[Value, Value]:
        """Queries [heads * head_dim], and the latent with the rotated part of the key."""
        if self.q_lora_rank is None:
            q, compressed = ops.linear(x, [params.q_proj, params.kv_a_proj_with_mqa], ctx)
            return q, compressed
        q, compressed = ops.linear(x, [params.q_a_proj, params.kv_a_proj_with_mqa], ctx)
        q = ops.rms_norm(q, params.q_a_layernorm, LATENT_NORM_EPS)
        (q,) = ops.linear(q, [params.q_b_proj], ctx)
        return q, compressed


def _rope_dim(fields: Fields) -> int:
    """Columns of a head's key that are rotated."""
    name = "rotary_dim" if fields.is_gguf else "qk_rope_head_dim"
    rope_dim = fields.integer(name, high=MAX_DIM)
    if rope_dim % 2:
        raise ConfigError(f"config field {fields.key(name)} {rope_dim} must be even")
    return rope_dim


def _head_dims(fields: Fields, rope_dim: int) -> tuple[int, int]:
    """Columns of a head's key that are not rotated, and of its value."""
    if not fields.is_gguf:
        nope_dim = fields.integer("qk_nope_head_dim", high=MAX_DIM)
        return nope_dim, fields.integer("v_head_dim", high=MAX_DIM)
    # files of before have the sizes of heads where those of now have the sizes of latents
    key = "qk_head_dim" if fields.has("qk_head_dim") else "head_dim"
    value = "v_head_dim" if fields.has("v_head_dim") else "value_length"
    nope_dim = fields.integer(key, low=rope_dim + 1, high=2 * MAX_DIM) - rope_dim
    return nope_dim, fields.integer(value, high=MAX_DIM)


def _softmax_scale(fields: Fields, head_dim: int) -> float:
    """head_dim^-0.5, times the square of YaRN's magnitude where the config says so."""
    scale = float(head_dim**-0.5)
    name = "yarn_log_multiplier" if fields.is_gguf else "mscale_all_dim"
    if fields.text("rope_type", "default") == "default" or not fields.has(name) or fields.is_zero(name):
        return scale
    mscale = fields.number(name) * (10 if fields.is_gguf else 1)  # GGUF's converter writes a tenth
    return scale * magnitude(fields.number("factor"), mscale) ** 2


def _mixture(fields: Fields, num_layers: int) -> Mixture:
    num_experts, size = num_experts_of(fields), expert_size_of(fields)
    num_groups = fields.integer("n_group", 1)
    route = RouteSpec(
        fields.integer("num_experts_per_tok", high=num_experts),
        "sigmoid",
        fields.boolean("norm_topk_prob", True),
        num_groups,
        fields.integer("topk_group", 1, high=num_groups),
        fields.number("routed_scaling_factor", 1.0),
    )
    check_groups(num_experts, route)
    return Mixture(
        num_experts=num_experts,
        intermediate_size=size,
        route=route,
        dense_layers=frozenset(range(min(fields.integer("first_k_dense_replace", 0, low=0), num_layers))),
        shared_expert="shared_experts",
        shared_size=size * fields.integer("n_shared_experts", 1),
        has_correction_bias=True,
    )
