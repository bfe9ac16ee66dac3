"""Blocks that families share. Widths and head counts come from the parameters' own shapes."""

from __future__ import annotations

from typing import Any

from jinn.ops.protocol import Context, KVSpec, Ops, Rope, RouteSpec, Value


def attention(ops: Ops[Value], params: Any, x: Value, ctx: Context, head_dim: int, rope: Rope) -> Value:
    """Grouped-query attention with rotary positions; params: q_proj, k_proj, v_proj, o_proj."""
    q, k, v = ops.linear(x, [params.q_proj, params.k_proj, params.v_proj])
    return attend(ops, params, q, k, v, ctx, head_dim, rope)


def attend(
    ops: Ops[Value], params: Any, q: Value, k: Value, v: Value, ctx: Context, head_dim: int, rope: Rope
) -> Value:
    """What follows the projections: rotate q and k, mix the values, project back."""
    num_heads = params.q_proj.weight.shape[0] // head_dim
    num_kv_heads = params.k_proj.weight.shape[0] // head_dim
    q = ops.rope(q, ctx, rope, num_heads)
    k = ops.rope(k, ctx, rope, num_kv_heads)
    mixed = ops.attention(q, k, v, ctx, KVSpec(num_kv_heads, head_dim, head_dim), head_dim**-0.5)
    (out,) = ops.linear(mixed, [params.o_proj])
    return out


def swiglu(ops: Ops[Value], params: Any, x: Value) -> Value:
    """down(silu(gate(x)) * up(x)); params: gate_proj, up_proj, down_proj."""
    gate, up = ops.linear(x, [params.gate_proj, params.up_proj])
    (out,) = ops.linear(ops.silu_mul(gate, up), [params.down_proj])
    return out


def mixture(ops: Ops[Value], params: Any, x: Value, spec: RouteSpec) -> Value:
    """The weighted sum of each token's experts; params: gate (the router), experts."""
    return ops.experts(x, ops.route(x, params.gate, spec), params.experts)
