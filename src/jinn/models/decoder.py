"""What decoder families have in common: config fields, parameters, GGUF names, costs and the road through.

As it stands, `Decoder` is pre-norm blocks of grouped-query attention with rotary positions, and SwiGLU. A
family's own file overrides what is different about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from jinn.models import layers
from jinn.models.fields import ConfigError, Fields
from jinn.models.parameters import Origin, ParameterSpec
from jinn.models.rope import num_positions, rope_of
from jinn.ops.protocol import Context, KVSpec, Ops, Rope, StateSpec, Value
from jinn.weights.checkpoint import Checkpoint

# GGUF's name of each module (convert_hf_to_gguf's tensor map)
GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}

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
    has_mtp: bool = False

    family: ClassVar[str]
    norm_offset: ClassVar[float] = 0.0  # what is added to the weights of norms

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config field num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 4:
            raise ConfigError(f"config field head_dim {self.head_dim} is no multiple of 4")

    def parameters(self) -> dict[str, ParameterSpec]:
        """Every parameter by its checkpoint key."""
        vocabulary = ParameterSpec((self.vocab_size, self.hidden_size))
        specs = {"model.embed_tokens.weight": vocabulary}
        for layer in range(self.num_hidden_layers):
            for name, spec in self.layer_parameters(layer).items():
                specs[f"model.layers.{layer}.{name}"] = spec
        specs["model.norm.weight"] = ParameterSpec((self.hidden_size,))
        if not self.tie_word_embeddings:
            specs["lm_head.weight"] = vocabulary
        return specs

    def layer_parameters(self, layer: int) -> dict[str, ParameterSpec]:
        """Those of one block, by the rest of their keys."""
        norm = ParameterSpec((self.hidden_size,))
        specs = {
            "input_layernorm.weight": norm,
            **self.attention_parameters(),
            "post_attention_layernorm.weight": norm,
            **self.mlp_parameters(),
        }
        for linear in self.biased_linears:
            weight = specs[f"{linear}.weight"]
            # a row-parallel linear's bias is added once, to the sum of the shares
            style = "replicated" if weight.parallel == "row" else weight.parallel
            specs[f"{linear}.bias"] = ParameterSpec(weight.shape[:1], style)
        return specs

    def attention_parameters(self) -> dict[str, ParameterSpec]:
        hidden = self.hidden_size
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": ParameterSpec((q_size, hidden), "column"),
            "self_attn.k_proj.weight": ParameterSpec((kv_size, hidden), "column"),
            "self_attn.v_proj.weight": ParameterSpec((kv_size, hidden), "column"),
            "self_attn.o_proj.weight": ParameterSpec((hidden, q_size), "row"),
        }

    def mlp_parameters(self) -> dict[str, ParameterSpec]:
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "mlp.gate_proj.weight": ParameterSpec((inner, hidden), "column"),
            "mlp.up_proj.weight": ParameterSpec((inner, hidden), "column"),
            "mlp.down_proj.weight": ParameterSpec((hidden, inner), "row"),
        }

    def origins(self, checkpoint: Checkpoint) -> dict[str, Origin]:
        """Where the checkpoint keeps each parameter."""
        if checkpoint.kind == "hf":
            return {name: Origin(name) for name in self.parameters()}
        return {name: self._gguf_origin(name) for name in self.parameters()}

    def _gguf_origin(self, name: str) -> Origin:
        module, _, kind = name.rpartition(".")
        if module in GGUF_TOP:
            return Origin(f"{GGUF_TOP[module]}.{kind}")
        _, _, layer, part = module.split(".", 3)
        return Origin(f"blk.{layer}.{GGUF_LAYER[part]}.{kind}", self.gguf_row_order(part))

    def gguf_row_order(self, part: str) -> npt.NDArray[np.int32] | None:
        """For each row of a layer's part, its row in GGUF; None where they are the same."""
        return None

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each attention layer keeps per token."""
        return (KVSpec(self.num_key_value_heads, self.head_dim, self.head_dim),) * self.num_hidden_layers

    def state_specs(self) -> tuple[StateSpec, ...]:
        """What each linear-attention layer keeps per sequence."""
        return ()

    def active_parameters(self) -> int:
        """Parameters that one token reads: all but the experts it does not choose."""
        return sum(spec.active_size for spec in self.parameters().values())

    def flops(self, num_tokens: int, context_len: int) -> float:
        """2 per weight of a linear, and 4 * heads * head_dim per layer, token and position it sees."""
        layers = [spec for name, spec in self.parameters().items() if name.startswith("model.layers.")]
        linear = sum(spec.active_size for spec in layers if len(spec.shape) > 1)
        head = self.vocab_size * self.hidden_size
        mean_context = context_len - (num_tokens - 1) / 2
        attention = 4 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * mean_context
        return num_tokens * (2.0 * (linear + head) + attention)

    def forward(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """Logits [batch.logit_rows, vocab_size]."""
        x = ops.select_rows(self._run_blocks(ops, params, ctx), ctx)
        return self._logits(ops, params, self.norm(ops, x, params.model.norm))

    def hidden(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """What the head reads: [tokens, hidden_size] after the final norm."""
        return self.norm(ops, self._run_blocks(ops, params, ctx), params.model.norm)

    def head(self, ops: Ops[Value], params: Any, hidden: Value, ctx: Context) -> Value:
        """Logits [batch.logit_rows, vocab_size] of hidden states [tokens, hidden_size]."""
        return self._logits(ops, params, ops.select_rows(hidden, ctx))

    def _run_blocks(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        x = ops.embed(params.model.embed_tokens, ctx)
        for index, layer in enumerate(params.model.layers):
            x = self.block(ops, layer, x, ctx.at_layer(index))
        return x

    def _logits(self, ops: Ops[Value], params: Any, hidden: Value) -> Value:
        head = params.model.embed_tokens if self.tie_word_embeddings else params.lm_head
        (logits,) = ops.linear(hidden, [head])
        return logits

    def predict(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """The multi-token prediction module's hidden states [tokens, hidden_size], for `head` to read.

        DeepSeek-V3's module (arXiv 2412.19437, section 2.2), with the embedding first, as it was released.
        """
        mtp = params.mtp
        embedding = self.norm(ops, ops.embed(params.model.embed_tokens, ctx), mtp.pre_fc_norm_embedding)
        hidden = self.norm(ops, ops.given_hidden(self.hidden_size, ctx), mtp.pre_fc_norm_hidden)
        (x,) = ops.linear(ops.join_heads([embedding, hidden], 1), [mtp.fc])
        x = self.block(ops, mtp.layers[0], x, ctx.at_layer(len(self.kv_specs()) - 1))
        return self.norm(ops, x, mtp.norm)

    def norm(self, ops: Ops[Value], x: Value, params: Any) -> Value:
        """RMSNorm of rows or heads, as the family scales it."""
        return ops.rms_norm(x, params, self.rms_norm_eps, self.norm_offset)

    def block(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        """One decoder layer: x [tokens, hidden_size] to the same."""
        normed = self.norm(ops, x, params.input_layernorm)
        x = ops.add(x, self.attention(ops, params.self_attn, normed, ctx))
        normed = self.norm(ops, x, params.post_attention_layernorm)
        return ops.add(x, self.mlp(ops, params.mlp, normed))

    def attention(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        """What the block adds first, of normed x."""
        return layers.attention(ops, params, x, ctx, self.head_dim, self.rope)

    def mlp(self, ops: Ops[Value], params: Any, x: Value) -> Value:
        """What the block adds last, of normed x."""
        return layers.swiglu(ops, params, x)


def decoder_fields(fields: Fields) -> dict[str, Any]:
    """`Decoder`'s fields but the biases, from a config. Raises ConfigError naming the field."""
    if fields.text("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"config field hidden_act {fields.get('hidden_act')!r} is not supported; supported is silu"
        )
    if fields.boolean("use_sliding_window", False):
        raise ConfigError("config field use_sliding_window is not supported; supported is false")
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // num_heads, high=MAX_HEAD_DIM)
    if fields.integer("rotary_dim", head_dim) != head_dim:
        raise ConfigError(f"config field {fields.key('rotary_dim')} must be the head size {head_dim}")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "intermediate_size": fields.integer("intermediate_size"),
        "num_hidden_layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "max_position_embeddings": num_positions(fields),
        "rope": rope_of(fields, head_dim),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
    }
