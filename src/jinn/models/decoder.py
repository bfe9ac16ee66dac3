"""What decoder families share: config, parameters and their places in files, costs, and the road through.

As it stands, `Decoder` is pre-norm blocks of grouped-query attention with rotary positions, and SwiGLU or a
mixture of experts. A family's own file overrides what is different about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal, Self

from jinn.models import layers
from jinn.models.fields import ConfigError, Fields
from jinn.models.mixture import Mixture, gguf_expert_origin, hf_expert_origin, mlp_parameters
from jinn.models.names import gguf_name, layer_and_part
from jinn.models.parameters import PLUS_ONE, Layout, Origin, ParameterSpec
from jinn.models.rope import num_positions, rope_of
from jinn.ops.protocol import Context, IntArray, KVSpec, Ops, Rope, StateSpec, Value

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (*QKV, "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# A config that lies must not make lists of its sizes before they are compared with the tensors.
MAX_LAYERS = 4096
MAX_HEAD_DIM = 65536


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A family's config, under Hugging Face's names, with its blocks."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    tie_word_embeddings: bool
    biased_linears: tuple[str, ...] = ()
    mixture: Mixture | None = None
    has_mtp: bool = False

    family: ClassVar[str]
    norm_offset: ClassVar[float] = 0.0  # what is added to a norm's weights
    # modules of a layer that this family's GGUF calls otherwise than names.py
    gguf_modules: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config field num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 4:
            raise ConfigError(f"config field head_dim {self.head_dim} is no multiple of 4")

    def parameters(self) -> dict[str, ParameterSpec]:
        """Every parameter by its checkpoint key; a multi-token prediction module's begin with `mtp.`."""
        vocabulary = ParameterSpec((self.vocab_size, self.hidden_size))
        specs = {"model.embed_tokens.weight": vocabulary}
        for layer in range(self.num_hidden_layers):
            for name, spec in self.layer_parameters(layer).items():
                specs[f"model.layers.{layer}.{name}"] = spec
        specs["model.norm.weight"] = ParameterSpec((self.hidden_size,))
        if not self.tie_word_embeddings:
            specs["lm_head.weight"] = vocabulary
        return {**specs, **self.prediction_parameters()} if self.has_mtp else specs

    def layer_parameters(self, layer: int) -> dict[str, ParameterSpec]:
        """Those of one block, by the rest of their keys; the prediction module's comes after the last."""
        norm = ParameterSpec((self.hidden_size,))
        specs = {
            "input_layernorm.weight": norm,
            **self.mixer_parameters(layer),
            "post_attention_layernorm.weight": norm,
            **self.mlp_parameters(layer),
        }
        for linear in self.biased_linears:
            weight = specs.get(f"{linear}.weight")
            if weight is not None:
                # a row-parallel linear's bias is added once, to the sum of the shares
                style = "replicated" if weight.parallel == "row" else weight.parallel
                specs[f"{linear}.bias"] = ParameterSpec(weight.shape[:1], style)
        return specs

    def mixer_parameters(self, layer: int) -> dict[str, ParameterSpec]:
        """Of what mixes a block's tokens."""
        return self.attention_parameters()

    def attention_parameters(self) -> dict[str, ParameterSpec]:
        hidden = self.hidden_size
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": ParameterSpec((q_size, hidden), "column"),
            "self_attn.k_proj.weight": ParameterSpec((kv_size, hidden), "column"),
            "self_attn.v_proj.weight": ParameterSpec((kv_size, hidden), "column"),
            "self_attn.o_proj.weight": ParameterSpec((hidden, q_size), "row"),
        }

    def mlp_parameters(self, layer: int) -> dict[str, ParameterSpec]:
        if self.mixture is not None and layer not in self.mixture.dense_layers:
            return self.mixture.parameters(self.hidden_size)
        return mlp_parameters("mlp", self.hidden_size, self.intermediate_size)

    def prediction_parameters(self) -> dict[str, ParameterSpec]:
        """Of the multi-token prediction module, under the names that Qwen's checkpoints have."""
        norm = ParameterSpec((self.hidden_size,))
        specs = {
            "mtp.pre_fc_norm_embedding.weight": norm,
            "mtp.pre_fc_norm_hidden.weight": norm,
            "mtp.fc.weight": ParameterSpec((self.hidden_size, 2 * self.hidden_size)),
            "mtp.norm.weight": norm,
        }
        block = self.layer_parameters(self.num_hidden_layers)
        return {**specs, **{f"mtp.layers.0.{name}": spec for name, spec in block.items()}}

    def origins(self, layout: Layout) -> dict[str, Origin]:
        """Where a file of this layout keeps each parameter."""
        place = self.hf_origin if layout.kind == "hf" else self.gguf_origin
        return {name: place(name, spec, layout) for name, spec in self.parameters().items()}

    def hf_origin(self, name: str, spec: ParameterSpec, layout: Layout) -> Origin:
        """Of one parameter in a Hugging Face folder."""
        if spec.parallel == "expert":
            return hf_expert_origin(name, spec, layout)
        return Origin(name)

    def gguf_origin(self, name: str, spec: ParameterSpec, layout: Layout) -> Origin:
        """Of one parameter in a GGUF file."""
        file_name = gguf_name(name, self.num_hidden_layers, self.gguf_modules)
        if spec.parallel == "expert":
            return gguf_expert_origin(file_name, spec, layout)
        if self.norm_offset and file_name.endswith("norm.weight"):
            return Origin(file_name, encoding=PLUS_ONE)
        if ".layers." not in name:
            return Origin(file_name)
        _, part = layer_and_part(name, self.num_hidden_layers)
        return Origin(file_name, rows=self.gguf_row_order(part.rpartition(".")[0]))

    def gguf_row_order(self, part: str) -> IntArray | None:
        """For each row of a layer's part, its row in GGUF; None where they are the same."""
        return None

    def ignores(self, tensor: str, layout: Layout) -> bool:
        """Whether such a file may have this tensor besides those of `parameters`: of a prediction module."""
        mark = prediction_mark(layout.kind, self.num_hidden_layers)
        block = mark.removesuffix("eh_proj.weight").removesuffix("nextn.")
        return tensor.startswith("mtp.") or (tensor.startswith(block) and mark in layout.tensors)

    def without_prediction(self) -> Self:
        """The model as if its file had no multi-token prediction module."""
        return replace(self, has_mtp=False)

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each attention layer keeps per token; the prediction module's is the last."""
        return (self.kv_spec(),) * (self.num_attention_layers + self.has_mtp)

    def kv_spec(self) -> KVSpec:
        return KVSpec(self.num_key_value_heads, self.head_dim, self.head_dim)

    @property
    def num_attention_layers(self) -> int:
        """Layers that keep keys and values, the prediction module's left out."""
        return self.num_hidden_layers

    def state_specs(self) -> tuple[StateSpec, ...]:
        """What each linear-attention layer keeps per sequence."""
        return ()

    def active_parameters(self) -> int:
        """Parameters that one token reads: not the experts it does not choose, nor the prediction module."""
        return sum(
            spec.active_size for name, spec in self.parameters().items() if not name.startswith("mtp.")
        )

    def flops(self, num_tokens: int, context_len: int) -> float:
        """Operations of the linears, of attention over what each token sees, and of the delta rule.

        2 per weight; 2 * heads * (key_dim + value_dim) per attention layer and position seen; 7 per number of
        a recurrent state: decay, read, update and output.
        """
        layers = [spec for name, spec in self.parameters().items() if name.startswith("model.layers.")]
        linear = sum(spec.active_size for spec in layers if len(spec.shape) > 1)
        head = self.vocab_size * self.hidden_size
        spec = self.kv_spec()
        mean_context = context_len - (num_tokens - 1) / 2
        per_position = 2 * self.num_attention_heads * (spec.key_dim + spec.value_dim)
        attention = self.num_attention_layers * per_position * mean_context
        states = sum(7 * prod((s.num_value_heads, s.key_dim, s.value_dim)) for s in self.state_specs())
        return num_tokens * (2.0 * (linear + head) + attention + states)

    def forward(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """Logits [batch.logit_rows, vocab_size]."""
        x = ops.select_rows(self._run_blocks(ops, params, ctx), ctx)
        return self._logits(ops, params, self.norm(ops, x, params.model.norm), ctx)

    def hidden(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """What the head reads: [tokens, hidden_size] after the final norm."""
        return self.norm(ops, self._run_blocks(ops, params, ctx), params.model.norm)

    def head(self, ops: Ops[Value], params: Any, hidden: Value, ctx: Context) -> Value:
        """Logits [batch.logit_rows, vocab_size] of hidden states [tokens, hidden_size]."""
        return self._logits(ops, params, ops.select_rows(hidden, ctx), ctx)

    def _run_blocks(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        x = ops.embed(params.model.embed_tokens, ctx)
        for index, layer in enumerate(params.model.layers):
            x = self.block(ops, layer, x, ctx.at_layer(self.cache_layer(index)))
        return x

    def cache_layer(self, layer: int) -> int:
        """The layer's number among those that keep the same kind of thing."""
        return layer

    def _logits(self, ops: Ops[Value], params: Any, hidden: Value, ctx: Context) -> Value:
        head = params.model.embed_tokens if self.tie_word_embeddings else params.lm_head
        (logits,) = ops.linear(hidden, [head], ctx)
        return logits

    def predict(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """The multi-token prediction module's hidden states [tokens, hidden_size], for `head` to read.

        DeepSeek-V3's module (arXiv 2412.19437, section 2.2), with the embedding first, as it was released.
        """
        mtp = params.mtp
        embedding = self.norm(ops, ops.embed(params.model.embed_tokens, ctx), mtp.pre_fc_norm_embedding)
        hidden = self.norm(ops, ops.given_hidden(self.hidden_size, ctx), mtp.pre_fc_norm_hidden)
        (x,) = ops.linear(ops.join_heads([embedding, hidden], 1), [mtp.fc], ctx)
        x = self.block(ops, mtp.layers[0], x, ctx.at_layer(self.num_attention_layers))
        return self.norm(ops, x, mtp.norm)

    def norm(self, ops: Ops[Value], x: Value, params: Any) -> Value:
        """RMSNorm of rows or heads, as the family scales it."""
        return ops.rms_norm(x, params, self.rms_norm_eps, self.norm_offset)

    def block(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        """One decoder layer: x [tokens, hidden_size] to the same."""
        x = ops.add(x, self.mixer(ops, params, self.norm(ops, x, params.input_layernorm), ctx))
        normed = self.norm(ops, x, params.post_attention_layernorm)
        return ops.add(x, self.mlp(ops, params.mlp, normed, ctx))

    def mixer(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        """What the block adds first, of normed x."""
        return self.attention(ops, params.self_attn, x, ctx)

    def attention(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        return layers.attention(ops, params, x, ctx, self.head_dim, self.rope)

    def mlp(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        """What the block adds last, of normed x."""
        if self.mixture is None or not hasattr(params, "experts"):
            return layers.swiglu(ops, params, x, ctx)
        shared = None if self.mixture.shared_expert is None else getattr(params, self.mixture.shared_expert)
        return layers.mixture(ops, params, x, ctx, self.mixture.route, shared)


def decoder_fields(
    fields: Fields, *, head_dim: int | None = None, rotary_dim: int | None = None
) -> dict[str, Any]:
    """`Decoder`'s fields but biases, mixture and prediction. Raises ConfigError naming the field.

    A family that has `head_dim` otherwise than the config's field, or rotates only `rotary_dim` columns of
    each head, says so.
    """
    if fields.text("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"config field hidden_act {fields.get('hidden_act')!r} is not supported; supported is silu"
        )
    if fields.boolean("use_sliding_window", False):
        raise ConfigError("config field use_sliding_window is not supported; supported is false")
    num_heads = fields.integer("num_attention_heads")
    if head_dim is None:
        head_dim = head_dim_of(fields)
    if rotary_dim is None:
        rotary_dim = head_dim
        if fields.integer("rotary_dim", head_dim) != head_dim:
            raise ConfigError(f"config field {fields.key('rotary_dim')} must be the head size {head_dim}")
        if fields.number("partial_rotary_factor", 1.0) != 1:
            raise ConfigError("config field partial_rotary_factor is not supported but as 1 for this family")
    moe_size = fields.get("moe_intermediate_size")  # models without a dense layer may have no other
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "intermediate_size": fields.integer("intermediate_size", moe_size),
        "num_hidden_layers": num_layers_of(fields),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "max_position_embeddings": num_positions(fields),
        "rope": rope_of(fields, rotary_dim),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
    }


def prediction_mark(kind: Literal["gguf", "hf"], num_layers: int) -> str:
    """A tensor that a file has with its prediction module, where that is the block after the last."""
    return (
        f"blk.{num_layers}.nextn.eh_proj.weight"
        if kind == "gguf"
        else f"model.layers.{num_layers}.eh_proj.weight"
    )


def head_dim_of(fields: Fields) -> int:
    """The config's head_dim, or the share of each head in the hidden size."""
    share = fields.integer("hidden_size") // fields.integer("num_attention_heads")
    return fields.integer("head_dim", share, high=MAX_HEAD_DIM)


def num_layers_of(fields: Fields) -> int:
    """Layers without the prediction module, which GGUF counts as a block where the file has it."""
    count = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    return count - (prediction_mark("gguf", count - 1) in fields.tensors)
