"""Qwen2 and Qwen2.5: the plain decoder with biases on q, k and v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from jinn.models.decoder import QKV, Decoder, decoder_fields
from jinn.models.fields import Fields


@dataclass(frozen=True, kw_only=True)
class Qwen2(Decoder):
    """The biases are the family's: no config field tells of them."""

    family = "qwen2"

    @classmethod
    def from_config(cls, fields: Fields) -> Self:
        return cls(**decoder_fields(fields), biased_linears=QKV)
