"""Qwen3-Next: three blocks of Gated DeltaNet to one of gated attention, and experts, one of them shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jinn.models import layers
from jinn.models.decoder import ATTENTION, MAX_HEAD_DIM, Decoder, decoder_fields, head_dim_of, prediction_mark
from jinn.models.delta_net import delta_net, delta_net_parameters, fused_rows, state_spec_of
from jinn.models.fields import ConfigError, Fields
from jinn.models.mixture import Mixture, expert_size_of, num_experts_of, route_spec, step_dense_layers
from jinn.models.parameters import NEGATIVE_EXP, Layout, Origin, ParameterSpec
from jinn.ops.protocol import Context, Ops, StateSpec, Value

KINDS = ("linear_attention", "full_attention")
DEFAULT_ROTARY_FACTOR = 0.25
GGUF_FUSED = {"in_proj_qkvz": "ssm_in", "in_proj_ba": "ssm_ba"}


@dataclass(frozen=True, kw_only=True)
class Qwen3Next(Decoder):
    """Norms scale by 1 + weight, but for the one in the DeltaNet, and rotation takes a part of each head.

    `has_tiled_output`: the columns of `out_proj` have value heads in GGUF's order for Qwen3.5. They cannot
    be put in order while loading, since a quantized block may have columns of two heads.
    """

    layer_types: tuple[str, ...]
    state_spec: StateSpec
    has_tiled_output: bool = False

    family = "qwen3_next"
    norm_offset: ClassVar[float] = 1.0
    gguf_modules: ClassVar[Mapping[str, str]] = {"post_attention_layernorm": "post_attention_norm"}

    @classmethod
    def from_config(cls, fields: Fields) -> Self:
        common = hybrid_fields(fields)
        dense_layers = step_dense_layers(fields, common["num_hidden_layers"])
        return cls(**common, mixture=shared_mixture(fields, dense_layers))

    @property
    def num_attention_layers(self) -> int:
        return self.layer_types.count("full_attention")

    def is_linear(self, layer: int) -> bool:
        """Whether the layer is a DeltaNet; the prediction module's is not."""
        return layer < self.num_hidden_layers and self.layer_types[layer] == "linear_attention"

    def cache_layer(self, layer: int) -> int:
        return self.layer_types[:layer].count(self.layer_types[layer])

    def state_specs(self) -> tuple[StateSpec, ...]:
        return (self.state_spec,) * self.layer_types.count("linear_attention")

    def mixer_parameters(self, layer: int) -> dict[str, ParameterSpec]:
        if self.is_linear(layer):
            return delta_net_parameters(self.state_spec, self.hidden_size)
        return self.attention_parameters()

    def attention_parameters(self) -> dict[str, ParameterSpec]:
        q_size, norm = 2 * self.num_attention_heads * self.head_dim, ParameterSpec((self.head_dim,))
        return {
            **super().attention_parameters(),
            "self_attn.q_proj.weight": ParameterSpec((q_size, self.hidden_size), "column"),
            "self_attn.q_norm.weight": norm,
            "self_attn.k_norm.weight": norm,
        }

    def hf_origin(self, name: str, spec: ParameterSpec, layout: Layout) -> Origin:
        part = name.split(".")[-2]
        if part == "conv1d":
            return Origin(name, shape=(spec.shape[0], 1, spec.shape[1]))
        if part.startswith("in_proj_"):
            return self.fused_origin(name, {})
        return super().hf_origin(name, spec, layout)

    def fused_origin(self, name: str, renamed: Mapping[str, str]) -> Origin:
        """Of a DeltaNet's projection where four are two; `renamed` has what a file calls the two."""
        prefix, part, leaf = name.rsplit(".", 2)
        fused = fused_rows(self.state_spec)[part]
        tensor = renamed.get(fused.tensor, fused.tensor)
        return Origin(f"{prefix}.{tensor}.{leaf}", shape=(fused.num_rows, self.hidden_size), rows=fused.rows)

    def gguf_origin(self, name: str, spec: ParameterSpec, layout: Layout) -> Origin:
        origin, part = super().gguf_origin(name, spec, layout), name.split(".")[-2]
        if name.endswith("A_log"):
            return Origin(origin.name, encoding=NEGATIVE_EXP)
        if name.endswith("linear_attn.norm.weight"):
            return Origin(origin.name)
        if part.startswith("in_proj_"):
            return self.gguf_projection(name, origin, layout)
        return origin

    def gguf_projection(self, name: str, origin: Origin, layout: Layout) -> Origin:
        """Of a DeltaNet's projection: b and a are always fused, the others in files of before."""
        block, part = origin.name.rsplit(".", 2)[0], name.split(".")[-2]
        if part in ("in_proj_b", "in_proj_a") or f"{block}.ssm_in.weight" in layout.tensors:
            return self.fused_origin(f"{block}.{part}.weight", GGUF_FUSED)
        return origin

    def mixer(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        if hasattr(params, "linear_attn"):
            net, eps = params.linear_attn, self.rms_norm_eps
            return delta_net(ops, net, x, ctx, self.state_spec, eps, self.has_tiled_output)
        return self.attention(ops, params.self_attn, x, ctx)

    def attention(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        q_and_gate, k, v = ops.linear(x, [params.q_proj, params.k_proj, params.v_proj], ctx)
        num_heads = params.o_proj.weight.shape[1] // self.head_dim
        q, gate = ops.split_heads(q_and_gate, num_heads, (self.head_dim, self.head_dim))
        q, k = self.norm(ops, q, params.q_norm), self.norm(ops, k, params.k_norm)
        return layers.attend(ops, params, q, k, v, ctx, self.head_dim, self.rope, gate)


def hybrid_fields(fields: Fields) -> dict[str, Any]:
    """The fields of Qwen3-Next and Qwen3.5 but the mixture. Raises ConfigError naming the field."""
    fields.supported("attn_output_gate", True)
    head_dim = head_dim_of(fields)
    common = decoder_fields(fields, head_dim=head_dim, rotary_dim=_rotary_dim(fields, head_dim))
    num_layers = common["num_hidden_layers"]
    mark = prediction_mark("gguf", num_layers) if fields.is_gguf else "mtp.fc.weight"
    return {
        **common,
        "biased_linears": ATTENTION if fields.boolean("attention_bias", False) else (),
        "layer_types": _layer_types(fields, num_layers),
        "state_spec": state_spec_of(fields),
        "has_mtp": mark in fields.tensors,
    }


def shared_mixture(fields: Fields, dense_layers: frozenset[int]) -> Mixture:
    """A mixture with a shared expert behind a gate of one number per token."""
    num_experts, size = num_experts_of(fields), expert_size_of(fields)
    return Mixture(
        num_experts=num_experts,
        intermediate_size=size,
        route=route_spec(fields, num_experts, is_renormalized=True),
        dense_layers=dense_layers,
        shared_expert="shared_expert",
        shared_size=fields.integer("shared_expert_intermediate_size", size),
        has_shared_gate=True,
    )


def _rotary_dim(fields: Fields, head_dim: int) -> int:
    share = int(head_dim * fields.number("partial_rotary_factor", DEFAULT_ROTARY_FACTOR))
    rotary_dim = fields.integer("rotary_dim", high=MAX_HEAD_DIM) if fields.has("rotary_dim") else share
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        name = fields.key("rotary_dim") if fields.has("rotary_dim") else "partial_rotary_factor"
        raise ConfigError(
            f"config field {name} rotates {rotary_dim} columns; supported are even numbers to {head_dim}"
        )
    return rotary_dim


def _layer_types(fields: Fields, num_layers: int) -> tuple[str, ...]:
    """Of every layer: as listed, or each `full_attention_interval`-th is full."""
    interval = fields.integer("full_attention_interval", 4)
    listed: Any = [KINDS[(i + 1) % interval == 0] for i in range(num_layers)]
    name = "recurrent_layers" if fields.has("recurrent_layers") else "layer_types"
    if fields.has(name):
        listed = fields.get(name)
        if name == "recurrent_layers" and isinstance(listed, Iterable):  # of GGUF: booleans
            listed = [KINDS[not is_recurrent] for is_recurrent in listed]
    if not isinstance(listed, list) or len(listed) < num_layers or any(kind not in KINDS for kind in listed):
        raise ConfigError(f"config field {fields.key(name)} must have {num_layers} of {', '.join(KINDS)}")
    return tuple(listed[:num_layers])
