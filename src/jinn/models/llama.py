"""Llama and SmolLM2: the plain decoder; GGUF keeps its q and k for pairs of neighbouring columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from jinn.models.decoder import ATTENTION, MLP, Decoder, decoder_fields
from jinn.models.fields import Fields
from jinn.ops.protocol import IntArray


@dataclass(frozen=True, kw_only=True)
class Llama(Decoder):
    """Biases where the config says so: on all linears of attention, of the MLP, or of both."""

    family = "llama"

    @classmethod
    def from_config(cls, fields: Fields) -> Self:
        attention = ATTENTION if fields.boolean("attention_bias", False) else ()
        mlp = MLP if fields.boolean("mlp_bias", False) else ()
        return cls(**decoder_fields(fields), biased_linears=(*attention, *mlp))

    def gguf_row_order(self, part: str) -> IntArray | None:
        if part == "self_attn.q_proj":
            return half_split_rows(self.num_attention_heads, self.head_dim)
        if part == "self_attn.k_proj":
            return half_split_rows(self.num_key_value_heads, self.head_dim)
        return None


def half_split_rows(num_heads: int, head_dim: int) -> IntArray:
    """For each row of q or k as Hugging Face has it, the row of GGUF's llama.

    GGUF rotates neighbours (2i, 2i + 1), Hugging Face halves (i, i + head_dim / 2).
    """
    rows = np.arange(num_heads * head_dim, dtype=np.int32)
    return np.ascontiguousarray(rows.reshape(num_heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1))
