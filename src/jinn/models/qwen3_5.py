"""Qwen3.5, dense and mixture, the language model alone: Qwen3-Next's blocks with the projections apart.

GGUF has the value heads tiled: those of different key heads side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from jinn.models.delta_net import tiled_qkv_rows, tiled_rows
from jinn.models.fields import Fields
from jinn.models.mixture import has_experts
from jinn.models.parameters import Layout, Origin, ParameterSpec
from jinn.models.qwen3_next import Qwen3Next, hybrid_fields, shared_mixture
from jinn.ops.protocol import IntArray

IMAGES = ("model.visual.", "visual.")  # the vision tower, which is left out
TEXT_PREFIX = "model.language_model."


@dataclass(frozen=True, kw_only=True)
class Qwen35(Qwen3Next):
    """Every block has an MLP, or every block has a mixture, whose weights are always renormalized."""

    family = "qwen3_5"

    @classmethod
    def from_config(cls, fields: Fields) -> Self:
        fields.supported("mtp_use_dedicated_embeddings", False)
        common = hybrid_fields(fields)
        mixture = None
        if has_experts(fields):
            fields.supported("norm_topk_prob", True)
            mixture = shared_mixture(fields, frozenset())
        spec = common["state_spec"]
        is_tiled = fields.is_gguf and spec.num_value_heads > spec.num_key_heads > 1
        return cls(**common, mixture=mixture, has_tiled_output=is_tiled)

    def hf_origin(self, name: str, spec: ParameterSpec, layout: Layout) -> Origin:
        if f"{TEXT_PREFIX}embed_tokens.weight" in layout.tensors and name.startswith("model."):
            name = TEXT_PREFIX + name.removeprefix("model.")
        part = name.split(".")[-2]
        origin = Origin(name) if part.startswith("in_proj_") else super().hf_origin(name, spec, layout)
        if part == "out_proj" and self.has_tiled_output:
            return replace(origin, columns=_inverse(tiled_rows(self.state_spec, self.state_spec.value_dim)))
        return origin

    def gguf_origin(self, name: str, spec: ParameterSpec, layout: Layout) -> Origin:
        origin = super().gguf_origin(name, spec, layout)
        part, width = name.split(".")[-2], self.state_spec.value_dim
        if part == "out_proj":
            columns = None if self.has_tiled_output else tiled_rows(self.state_spec, width)
            return replace(origin, columns=columns)
        if part in ("in_proj_qkv", "conv1d"):
            return replace(origin, rows=tiled_qkv_rows(self.state_spec))
        if part == "in_proj_z":
            return replace(origin, rows=tiled_rows(self.state_spec, width))
        if part in ("in_proj_b", "in_proj_a") or name.endswith(("A_log", "dt_bias")):
            return replace(origin, rows=tiled_rows(self.state_spec, 1))
        return origin

    def gguf_projection(self, name: str, origin: Origin, layout: Layout) -> Origin:
        return origin

    def ignores(self, tensor: str, layout: Layout) -> bool:
        return tensor.startswith(IMAGES) or super().ignores(tensor, layout)


def _inverse(order: IntArray) -> IntArray:
    return order.argsort().astype(np.int32)
