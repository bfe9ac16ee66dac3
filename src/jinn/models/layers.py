"""Blocks that families share. Widths and head counts come from the parameters' own shapes."""

from __future__ import annotations

from typing import Any

from jinn.ops.protocol import Context, KVSpec, Ops, Rope, RouteSpec, Value


def attention(ops: Ops[Value], params: Any, x: Value, ctx: Context, head_dim: int, rope: Rope) -> Value:
    """Grouped-query attention with rotary positions; params: q_proj, k_proj, v_proj, o_proj."""
    q, k, v = ops.linear(x, [params.q_proj, params.k_proj, params.v_proj], ctx)
    return attend(ops, params, q, k, v, ctx, head_dim, rope)


def attend(
    ops: Ops[Value],
    params: Any,
    q: Value,
    k: Value,
    v: Value,
    ctx: Context,
    head_dim: int,
    rope: Rope,
    gate: Value | None = None,
) -> Value:
    """What follows the projections: rotate q and k, mix the values, dampen them by the gate, project back."""
    num_heads = params.o_proj.weight.shape[1] // head_dim
    num_kv_heads = params.k_proj.weight.shape[0] // head_dim
    q = ops.rope(q, ctx, rope, num_heads)
    k = ops.rope(k, ctx, rope, num_kv_heads)
    mixed = ops.attention(q, k, v, ctx, KVSpec(num_kv_heads, head_dim, head_dim), head_dim**-0.5)
    (out,) = ops.linear(mixed if gate is None else ops.sigmoid_mul(mixed, gate), [params.o_proj], ctx)
    return out


def swiglu(ops: Ops[Value], params: Any, x: Value, ctx: Context) -> Value:
    """down(silu(gate(x)) * up(x)); params: gate_proj, up_proj, down_proj."""
    gate, up = ops.linear(x, [params.gate_proj, params.up_proj], ctx)
    (out,) = ops.linear(ops.silu_mul(gate, up), [params.down_proj], ctx)
    return out


def mixture(
    ops: Ops[Value], params: Any, x: Value, ctx: Context, spec: RouteSpec, shared: Any = None
) -> Value:
    """The weighted sum of each token's experts, and the shared expert; params: gate (the router), experts.

    `shared` has the shared expert's parameters, and params may have its `shared_expert_gate`.
    """
    mixed = ops.experts(x, ops.route(x, params.gate, spec), params.experts)
    if shared is None:
        return mixed
    y = swiglu(ops, shared, x, ctx)
    if hasattr(params, "shared_expert_gate"):
        (gate,) = ops.linear(x, [params.shared_expert_gate], ctx)
        y = ops.sigmoid_mul(y, gate)
    return ops.add(mixed, y)
