"""Llama and SmolLM2: pre-norm blocks of grouped-query attention with rotary positions, and SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from jinn.models import layers
from jinn.models.fields import ConfigError, Fields
from jinn.models.parameters import Origin, ParameterSpec
from jinn.models.rope import rope_from_hf, rope_from_theta
from jinn.ops.protocol import Context, KVSpec, Ops, Rope, Value
from jinn.weights.checkpoint import Checkpoint
from jinn.weights.quantize import dequantize

# GGUF's name of each module (convert_hf_to_gguf's tensor map)
GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# A config that lies must not make lists of its sizes before they are compared with the tensors.
MAX_LAYERS = 4096
MAX_HEAD_DIM = 65536


@dataclass(frozen=True, slots=True)
class Llama:
    """The family's config, under Hugging Face's names, with its blocks."""

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
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    family = "llama"

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config field num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 4:
            raise ConfigError(f"config field head_dim {self.head_dim} is no multiple of 4")

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read the config that came with the weights. Raises ConfigError naming the field."""
        return (
            cls._from_gguf(checkpoint) if checkpoint.kind == "gguf" else cls.from_hf(checkpoint.config_source)
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the contents of config.json."""
        fields = Fields(config)
        if fields.text("hidden_act", "silu") != "silu":
            raise ConfigError(
                f"config field hidden_act {config['hidden_act']!r} is not supported; supported is silu"
            )
        num_heads = fields.integer("num_attention_heads")
        head_dim = fields.integer("head_dim", fields.integer("hidden_size") // num_heads, high=MAX_HEAD_DIM)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers", high=MAX_LAYERS),
            num_attention_heads=num_heads,
            num_key_value_heads=fields.integer("num_key_value_heads", num_heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=fields.integer("max_position_embeddings", 2048),
            rope=rope_from_hf(config, head_dim),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            attention_bias=fields.boolean("attention_bias", False),
            mlp_bias=fields.boolean("mlp_bias", False),
        )

    @classmethod
    def _from_gguf(cls, checkpoint: Checkpoint) -> Self:
        fields = Fields(checkpoint.config_source, f"{checkpoint.architecture}.")
        tensors = checkpoint.tensors
        if "token_embd.weight" not in tensors:
            raise ConfigError(f"{checkpoint.path}: tensor 'token_embd.weight' is missing")
        num_heads = fields.integer("attention.head_count")
        default_head_dim = fields.integer("embedding_length") // num_heads
        head_dim = fields.integer("attention.key_length", default_head_dim, high=MAX_HEAD_DIM)
        if fields.integer("rope.dimension_count", head_dim) != head_dim:
            raise ConfigError(
                f"config field {fields.prefix}rope.dimension_count must be the head size {head_dim}"
            )
        scaling = fields.text("rope.scaling.type", "none")
        if scaling != "none":
            raise ConfigError(f"config field {fields.prefix}rope.scaling.type {scaling!r} is not supported")
        divisors = None
        if "rope_freqs.weight" in tensors:
            info = tensors["rope_freqs.weight"]
            divisors = dequantize(checkpoint.data(info.name), info.format, info.shape).tolist()
        return cls(
            vocab_size=tensors["token_embd.weight"].shape[0],
            hidden_size=fields.integer("embedding_length"),
            intermediate_size=fields.integer("feed_forward_length"),
            num_hidden_layers=fields.integer("block_count", high=MAX_LAYERS),
            num_attention_heads=num_heads,
            num_key_value_heads=fields.integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=fields.integer("context_length"),
            rope=rope_from_theta(fields.number("rope.freq_base", 10000.0), head_dim, divisors),
            tie_word_embeddings="output.weight" not in tensors,
            attention_bias="blk.0.attn_q.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
        )

    def parameters(self) -> dict[str, ParameterSpec]:
        """Every parameter by its checkpoint key."""
        vocabulary = ParameterSpec((self.vocab_size, self.hidden_size))
        specs = {"model.embed_tokens.weight": vocabulary}
        for layer in range(self.num_hidden_layers):
            for name, spec in self._layer_parameters().items():
                specs[f"model.layers.{layer}.{name}"] = spec
        specs["model.norm.weight"] = ParameterSpec((self.hidden_size,))
        if not self.tie_word_embeddings:
            specs["lm_head.weight"] = vocabulary
        return specs

    def _layer_parameters(self) -> dict[str, ParameterSpec]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        specs = {
            "input_layernorm.weight": ParameterSpec((hidden,)),
            "self_attn.q_proj.weight": ParameterSpec((q_size, hidden), "column"),
            "self_attn.k_proj.weight": ParameterSpec((kv_size, hidden), "column"),
            "self_attn.v_proj.weight": ParameterSpec((kv_size, hidden), "column"),
            "self_attn.o_proj.weight": ParameterSpec((hidden, q_size), "row"),
            "post_attention_layernorm.weight": ParameterSpec((hidden,)),
            "mlp.gate_proj.weight": ParameterSpec((inner, hidden), "column"),
            "mlp.up_proj.weight": ParameterSpec((inner, hidden), "column"),
            "mlp.down_proj.weight": ParameterSpec((hidden, inner), "row"),
        }
        biased = [*(["self_attn"] if self.attention_bias else []), *(["mlp"] if self.mlp_bias else [])]
        for name, spec in list(specs.items()):
            if name.split(".")[0] in biased:
                bias_style = "replicated" if spec.parallel == "row" else spec.parallel
                specs[name.replace(".weight", ".bias")] = ParameterSpec(spec.shape[:1], bias_style)
        return specs

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
        heads = {
            "self_attn.q_proj": self.num_attention_heads,
            "self_attn.k_proj": self.num_key_value_heads,
        }.get(part)
        row_order = None if heads is None else half_split_rows(heads, self.head_dim)
        return Origin(f"blk.{layer}.{GGUF_LAYER[part]}.{kind}", row_order)

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each attention layer keeps per token."""
        return (KVSpec(self.num_key_value_heads, self.head_dim, self.head_dim),) * self.num_hidden_layers

    def active_parameters(self) -> int:
        """Parameters that one token reads: all of them."""
        return sum(prod(spec.shape) for spec in self.parameters().values())

    def flops(self, num_tokens: int, context_len: int) -> float:
        """2 per weight of a linear, and 4 * heads * head_dim per layer, token and position it sees."""
        linear = sum(prod(spec.shape) for spec in self.parameters().values() if spec.parallel != "replicated")
        head = self.vocab_size * self.hidden_size
        mean_context = context_len - (num_tokens - 1) / 2
        attention = 4 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * mean_context
        return num_tokens * (2.0 * (linear + head) + attention)

    def forward(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """Logits [batch.logit_rows, vocab_size]."""
        x = ops.embed(params.model.embed_tokens, ctx)
        for index, layer in enumerate(params.model.layers):
            x = self.block(ops, layer, x, ctx.at_layer(index))
        x = ops.rms_norm(ops.select_rows(x, ctx), params.model.norm, self.rms_norm_eps)
        (logits,) = ops.linear(x, [params.model.embed_tokens if self.tie_word_embeddings else params.lm_head])
        return logits

    def block(self, ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
        """One decoder layer: x [tokens, hidden_size] to the same."""
        normed = ops.rms_norm(x, params.input_layernorm, self.rms_norm_eps)
        x = ops.add(x, layers.attention(ops, params.self_attn, normed, ctx, self.head_dim, self.rope))
        normed = ops.rms_norm(x, params.post_attention_layernorm, self.rms_norm_eps)
        return ops.add(x, layers.swiglu(ops, params.mlp, normed))


def half_split_rows(num_heads: int, head_dim: int) -> npt.NDArray[np.int32]:
    """For each row of q or k as Hugging Face has it, the row of GGUF's llama.

    GGUF rotates neighbours (2i, 2i + 1), Hugging Face halves (i, i + head_dim / 2).
    """
    rows = np.arange(num_heads * head_dim, dtype=np.int32)
    return np.ascontiguousarray(rows.reshape(num_heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1))
