"""Gated DeltaNet, the linear attention of Qwen3-Next and Qwen3.5: its parameters, its block, its head orders.

Parameters are the five projections apart, heads in order: q, k and v of all heads in one (`in_proj_qkv`), the
output gate (`in_proj_z`), and per value head the update rate (`in_proj_b`) and the decay (`in_proj_a`). Files
keep them fused, grouped or tiled; the functions here tell the rows. Value head h belongs to key head
`h // group`, where `group` is value heads per key head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from jinn.models.fields import ConfigError, Fields
from jinn.models.parameters import ParameterSpec
from jinn.ops.protocol import Context, IntArray, Ops, StateSpec, Value

# A config that lies must not make lists of its sizes before they are compared with the tensors.
MAX_HEADS, MAX_DIM, MAX_KERNEL = 1024, 1024, 64


def state_spec_of(fields: Fields) -> StateSpec:
    """What such a layer keeps. Raises ConfigError naming the field."""
    num_key_heads = fields.integer("linear_num_key_heads", high=MAX_HEADS)
    num_value_heads = fields.integer("linear_num_value_heads", high=MAX_HEADS)
    if num_value_heads % num_key_heads:
        raise ConfigError(
            f"config field {fields.key('linear_num_value_heads')} {num_value_heads} is no multiple of "
            f"{fields.key('linear_num_key_heads')} {num_key_heads}"
        )
    key_dim = fields.integer("linear_key_head_dim", high=MAX_DIM)
    if fields.has("linear_inner_size"):
        low, high = num_value_heads, num_value_heads * MAX_DIM
        value_dim = fields.integer("linear_inner_size", low=low, high=high) // num_value_heads
    else:
        value_dim = fields.integer("linear_value_head_dim", high=MAX_DIM)
    kernel = fields.integer("linear_conv_kernel_dim", 4, low=2, high=MAX_KERNEL)
    return StateSpec(num_key_heads, num_value_heads, key_dim, value_dim, kernel)


def delta_net_parameters(spec: StateSpec, hidden_size: int) -> dict[str, ParameterSpec]:
    """Of one layer, by the rest of their keys."""
    value_size = spec.num_value_heads * spec.value_dim
    per_head = ParameterSpec((spec.num_value_heads, hidden_size))
    return {
        "linear_attn.in_proj_qkv.weight": ParameterSpec((spec.conv_dim, hidden_size)),
        "linear_attn.in_proj_z.weight": ParameterSpec((value_size, hidden_size)),
        "linear_attn.in_proj_b.weight": per_head,
        "linear_attn.in_proj_a.weight": per_head,
        "linear_attn.conv1d.weight": ParameterSpec((spec.conv_dim, spec.conv_kernel), keeps_float32=True),
        "linear_attn.A_log": ParameterSpec((spec.num_value_heads,)),
        "linear_attn.dt_bias": ParameterSpec((spec.num_value_heads,)),
        "linear_attn.norm.weight": ParameterSpec((spec.value_dim,)),
        "linear_attn.out_proj.weight": ParameterSpec((hidden_size, value_size)),
    }


def delta_net(
    ops: Ops[Value], params: Any, x: Value, ctx: Context, spec: StateSpec, eps: float, has_tiled_output: bool
) -> Value:
    """The block's token mixer, of normed x (arXiv 2412.06464, with a silu gate on the normed output)."""
    projections = [params.in_proj_qkv, params.in_proj_z, params.in_proj_b, params.in_proj_a]
    qkv, z, b, a = ops.linear(x, projections, ctx)
    qkv = ops.causal_conv1d(qkv, params.conv1d, ctx, spec)
    mixed = ops.gated_delta_rule(qkv, a, b, params, ctx, spec)
    gated = ops.silu_mul(z, ops.rms_norm(mixed, params.norm, eps))  # one weight [value_dim] for all heads
    if has_tiled_output:
        group = spec.num_value_heads // spec.num_key_heads
        gated = ops.join_heads(ops.split_heads(gated, spec.num_key_heads, [spec.value_dim] * group), 1)
    (out,) = ops.linear(gated, [params.out_proj], ctx)
    return out


@dataclass(frozen=True, slots=True)
class FusedRows:
    """The rows of a projection in a tensor of `num_rows` that has others too."""

    tensor: Literal["in_proj_qkvz", "in_proj_ba"]
    num_rows: int
    rows: IntArray


@cache
def fused_rows(spec: StateSpec) -> Mapping[str, FusedRows]:
    """Where Qwen3-Next's two tensors have each projection: for each key head in order, its q, k, v and z."""
    group = spec.num_value_heads // spec.num_key_heads
    values = group * spec.value_dim
    q, k, v, z = _runs(spec.num_key_heads, (spec.key_dim, spec.key_dim, values, values))
    b, a = _runs(spec.num_key_heads, (group, group))
    num_qkvz, num_ba = len(q) + len(k) + len(v) + len(z), len(b) + len(a)
    return {
        "in_proj_qkv": FusedRows("in_proj_qkvz", num_qkvz, np.concatenate((q, k, v))),
        "in_proj_z": FusedRows("in_proj_qkvz", num_qkvz, z),
        "in_proj_b": FusedRows("in_proj_ba", num_ba, b),
        "in_proj_a": FusedRows("in_proj_ba", num_ba, a),
    }


def _runs(num_groups: int, widths: tuple[int, ...]) -> tuple[IntArray, ...]:
    """Of rows in groups of runs of these widths: the rows of run i of all groups."""
    starts = np.arange(num_groups, dtype=np.int32)[:, None] * sum(widths)
    firsts = np.cumsum([0, *widths[:-1]])
    return tuple(
        (starts + first + np.arange(width)).astype(np.int32).reshape(-1)
        for first, width in zip(firsts, widths, strict=True)
    )


@cache
def tiled_rows(spec: StateSpec, width: int) -> IntArray:
    """For each row of all value heads, `width` each, its row where heads are tiled: key heads run fastest."""
    group = spec.num_value_heads // spec.num_key_heads
    head = np.arange(spec.num_value_heads)
    place = head % group * spec.num_key_heads + head // group
    return (place[:, None] * width + np.arange(width)).astype(np.int32).reshape(-1)


@cache
def tiled_qkv_rows(spec: StateSpec) -> IntArray:
    """The same for q, k and v together: only those of v differ."""
    num_before = 2 * spec.num_key_heads * spec.key_dim
    before = np.arange(num_before, dtype=np.int32)
    return np.concatenate((before, num_before + tiled_rows(spec, spec.value_dim)))
