"""The definition of each op: the shortest correct torch, forward and gradient, on any device.

`activations` repeats what the native kernels do to a linear's input, so that both can be compared closely:
"int8" and "int12" round it to 8 or 12 bits in groups of 32 where the weight is quantized, "mixed" to 8 bits
but for outliers, which stay, "bf16" to bfloat16, "f32" leaves it alone. `PagedCache` and `StateStore` are the
plain twins of the native caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jinn.ops.protocol import Batch, Context, KVSpec, LowRank, Rope, RouteSpec, Routing, StateSpec

GROUP = 32
MAX_OUTLIERS = 2  # of a group
LEVELS = {"int8": 127.0, "int12": 2032.0}
INTEGERS = (*LEVELS, "mixed")
FLOAT_FORMATS = ("F32", "F16", "BF16")
L2_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """A `Batch` as tensors: integers are int64, hidden states float32."""

    token_ids: Tensor  # [num_tokens]
    positions: Tensor  # [num_tokens]
    query_start: Tensor  # [num_seqs + 1]
    context_lens: Tensor  # [num_seqs]
    block_tables: Tensor  # [num_seqs, max_blocks]
    logit_rows: Tensor  # [num_rows]
    state_slots: Tensor  # [num_seqs], or none
    num_drafts: Tensor  # [num_seqs], or none
    num_accepted: Tensor  # [num_seqs], or none
    hidden: Tensor  # [num_tokens, hidden_size], or none
    adapters: Tensor  # [num_seqs], or none

    def tokens(self, s: int) -> slice:
        """Those of sequence s."""
        return slice(int(self.query_start[s]), int(self.query_start[s + 1]))


def tensor_batch(batch: Batch, device: str = "cpu") -> TensorBatch:
    """The batch as `ReferenceOps` reads it."""

    def tensor(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=device)

    return TensorBatch(
        tensor(batch.token_ids),
        tensor(batch.positions),
        tensor(batch.query_start),
        tensor(batch.context_lens),
        tensor(batch.block_tables),
        tensor(batch.logit_rows),
        tensor(batch.state_slots),
        tensor(batch.num_drafts),
        tensor(batch.num_accepted),
        torch.as_tensor(batch.hidden, device=device),
        tensor(batch.adapters),
    )


class ReferenceOps:
    """The op protocol on torch tensors [tokens, features]; `ctx.batch` is a `TensorBatch`.

    A weight may name its format as `weight.format`, as PackedTensor does; without one it counts as F32.
    """

    def __init__(self, activations: str = "f32") -> None:
        self.activations = activations

    def embed(self, node: Any, ctx: Context) -> Tensor:
        return functional.embedding(ctx.batch.token_ids, node.weight).float()

    def linear(self, x: Tensor, nodes: Sequence[Any], ctx: Context) -> tuple[Tensor, ...]:
        outputs = []
        for node in nodes:
            held = self.held(x, getattr(node.weight, "format", "F32"))
            y: Tensor = held @ node.weight.float().T
            bias = getattr(node, "bias", None)
            y = y if bias is None else y + bias.float()
            outputs.append(_adapted(y, x, getattr(node, "adapters", ()), ctx))
        return tuple(outputs)

    def held(self, x: Tensor, weight_format: str) -> Tensor:
        """x as a weight of this format reads it."""
        if self.activations in INTEGERS and weight_format not in FLOAT_FORMATS:
            return integer_groups(x, self.activations)
        if self.activations == "bf16" or (self.activations in INTEGERS and weight_format == "BF16"):
            return x.bfloat16().float()
        return x

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate.sigmoid()

    def rms_norm(self, x: Tensor, node: Any, eps: float, offset: float = 0.0) -> Tensor:
        runs = x.reshape(len(x), -1, node.weight.shape[0])
        scaled = runs * torch.rsqrt(runs.square().mean(-1, keepdim=True) + eps)
        y: Tensor = scaled * (offset + node.weight)
        return y.flatten(-2)

    def rope(self, x: Tensor, ctx: Context, rope: Rope, num_heads: int) -> Tensor:
        n = len(rope.inv_freq)
        frequencies = torch.tensor(rope.inv_freq, dtype=torch.float32, device=x.device)
        angles = ctx.batch.positions[:, None].float() * frequencies
        cos = (angles.cos() * rope.attention_factor)[:, None, :]
        sin = (angles.sin() * rope.attention_factor)[:, None, :]
        heads = x.reshape(len(x), num_heads, -1)
        rotated, rest = heads[..., : 2 * n], heads[..., 2 * n :]
        if rope.is_interleaved:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = rotated[..., :n], rotated[..., n:]
            pairs = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((pairs, rest), dim=-1).flatten(-2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, spec: KVSpec, scale: float) -> Tensor:
        queries = q.reshape(len(q), -1, spec.key_dim)
        keys = k.reshape(len(k), spec.num_kv_heads, spec.key_dim)
        values = v.reshape(len(v), spec.num_kv_heads, spec.value_dim)
        outputs = []
        for s in range(len(ctx.batch.context_lens)):
            mine = ctx.batch.tokens(s)
            context_len = int(ctx.batch.context_lens[s])
            seen_keys, seen_values, asking = keys[mine], values[mine], queries[mine]
            if ctx.cache is not None:
                ctx.cache.store(ctx.layer, ctx.batch, s, seen_keys, seen_values)
                seen_keys, seen_values = ctx.cache.load(ctx.layer, ctx.batch, s)
                asking = ctx.cache.held_queries(asking)
            outputs.append(_attend(asking, seen_keys, seen_values, context_len, scale))
        return torch.cat(outputs).flatten(-2)

    def split_heads(self, x: Tensor, num_heads: int, widths: Sequence[int]) -> tuple[Tensor, ...]:
        runs = torch.split(x.reshape(len(x), num_heads, sum(widths)), list(widths), dim=-1)
        return tuple(run.flatten(-2) for run in runs)

    def join_heads(self, values: Sequence[Tensor], num_heads: int) -> Tensor:
        runs = [value.reshape(len(value), num_heads, -1) for value in values]
        return torch.cat(runs, dim=-1).flatten(-2)

    def head_linear(self, x: Tensor, node: Any) -> Tensor:
        held = self.held(x, getattr(node.weight, "format", "F32"))
        heads = held.reshape(len(x), node.weight.shape[0], -1)
        return torch.einsum("thi,hoi->tho", heads, node.weight.float()).flatten(-2)

    def causal_conv1d(self, x: Tensor, node: Any, ctx: Context, spec: StateSpec) -> Tensor:
        num_before = spec.conv_kernel - 1
        outputs = []
        for s in range(len(ctx.batch.context_lens)):
            mine = x[ctx.batch.tokens(s)]
            before = _state_before(ctx, "conv", s, x.new_zeros(num_before, spec.conv_dim))
            inputs = torch.cat((before, mine))
            windows = inputs.unfold(0, spec.conv_kernel, 1)  # [tokens, conv_dim, conv_kernel]
            outputs.append(functional.silu((windows * node.weight).sum(-1)))
            _keep_states(ctx, "conv", s, [inputs[t : t + num_before] for t in range(len(mine) + 1)])
        return torch.cat(outputs)

    def gated_delta_rule(
        self, qkv: Tensor, a: Tensor, b: Tensor, node: Any, ctx: Context, spec: StateSpec
    ) -> Tensor:
        key_cols, value_cols = spec.num_key_heads * spec.key_dim, spec.num_value_heads * spec.value_dim
        group = spec.num_value_heads // spec.num_key_heads
        q, k, v = torch.split(qkv, [key_cols, key_cols, value_cols], dim=-1)
        q = _l2_normed(q.reshape(len(q), -1, spec.key_dim)) * spec.key_dim**-0.5
        k = _l2_normed(k.reshape(len(k), -1, spec.key_dim))
        q, k = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)
        v = v.reshape(len(v), -1, spec.value_dim)
        decay = (-node.A_log.exp() * functional.softplus(a + node.dt_bias)).exp()
        outputs = []
        for s in range(len(ctx.batch.context_lens)):
            mine = ctx.batch.tokens(s)
            zero = v.new_zeros(spec.num_value_heads, spec.key_dim, spec.value_dim)
            states = [_state_before(ctx, "delta", s, zero)]
            for t in range(mine.start, mine.stop):
                state = states[-1] * decay[t, :, None, None]
                delta = b[t].sigmoid()[:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
                states.append(state + torch.einsum("hk,hv->hkv", k[t], delta))
                outputs.append(torch.einsum("hkv,hk->hv", states[-1], q[t]))
            _keep_states(ctx, "delta", s, states)
        return torch.stack(outputs).flatten(-2)

    def route(self, x: Tensor, node: Any, spec: RouteSpec) -> Routing[Tensor]:
        logits = x.float() @ node.weight.float().T
        scores = logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()
        ranking = scores.detach() + getattr(node, "e_score_correction_bias", 0.0)
        if spec.num_groups > 1:
            ranking = _best_groups(ranking, spec)
        ids = _best(ranking, spec.num_experts_per_tok)
        weights = scores.gather(-1, ids)
        if spec.is_renormalized:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(ids, weights * spec.scaling, scores)

    def experts(self, x: Tensor, routing: Routing[Tensor], node: Any) -> Tensor:
        outputs = x.new_zeros(*routing.ids.shape, node.down_proj.weight.shape[1])
        for expert in sorted(set(routing.ids.flatten().tolist())):
            tokens, ranks = (routing.ids == expert).nonzero(as_tuple=True)
            gate = self._expert_linear(x[tokens], node.gate_proj.weight, expert)
            up = self._expert_linear(x[tokens], node.up_proj.weight, expert)
            outputs[tokens, ranks] = self._expert_linear(
                self.silu_mul(gate, up), node.down_proj.weight, expert
            )
        y = torch.zeros_like(outputs[:, 0])
        for rank in range(outputs.shape[1]):
            y = y + routing.weights[:, rank, None] * outputs[:, rank]
        return y

    def _expert_linear(self, x: Tensor, weight: Any, expert: int) -> Tensor:
        y: Tensor = self.held(x, getattr(weight, "format", "F32")) @ weight[expert].float().T
        return y

    def given_hidden(self, cols: int, ctx: Context) -> Tensor:
        hidden: Tensor = ctx.batch.hidden.reshape(-1, cols)
        return hidden

    def select_rows(self, x: Tensor, ctx: Context) -> Tensor:
        rows: Tensor = x[ctx.batch.logit_rows]
        return rows


def _adapted(y: Tensor, x: Tensor, adapters: Sequence[LowRank | None], ctx: Context) -> Tensor:
    """y and what each token's adapter adds to its row."""
    if not any(adapters) or not len(ctx.batch.adapters):
        return y
    adapter_of = ctx.batch.adapters.repeat_interleave(ctx.batch.query_start.diff())
    for index, change in enumerate(adapters):
        if change is not None:
            addend = x.float() @ change.a.float().T @ change.b.float().T
            y = torch.where((adapter_of == index)[:, None], y + addend, y)
    return y


def _l2_normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS)


def _state_before(ctx: Context, kind: str, s: int, zero: Tensor) -> Tensor:
    """What layer `ctx.layer` knows of sequence s before its first token of the batch."""
    batch = ctx.batch
    if ctx.cache is None or int(batch.positions[batch.tokens(s).start]) == 0:
        return zero
    state: Tensor = ctx.cache.states.load(
        (kind, ctx.layer), int(batch.state_slots[s]), _at(batch.num_accepted, s)
    )
    return state


def _keep_states(ctx: Context, kind: str, s: int, states: Sequence[Tensor]) -> None:
    """Of the states before sequence s and after each of its tokens, those from the first draft on."""
    if ctx.cache is not None:
        settled = len(states) - 1 - _at(ctx.batch.num_drafts, s)
        ctx.cache.states.store((kind, ctx.layer), int(ctx.batch.state_slots[s]), states[settled:])


def _at(counts: Tensor, s: int) -> int:
    """A sequence's count; none of a batch that has no counts."""
    return int(counts[s]) if len(counts) else 0


def _best(ranking: Tensor, count: int) -> Tensor:
    """Columns of each row's largest numbers, best first; ties go to the lower column."""
    return ranking.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _best_groups(ranking: Tensor, spec: RouteSpec) -> Tensor:
    """The ranking with -inf outside the groups that may be chosen from."""
    groups = ranking.reshape(len(ranking), spec.num_groups, -1)
    chosen = _best(groups.topk(2).values.sum(-1), spec.num_chosen_groups)
    allowed = torch.full_like(groups[..., 0], float("-inf")).scatter(-1, chosen, 0.0)
    return (groups + allowed[..., None]).flatten(-2)


def _attend(q: Tensor, k: Tensor, v: Tensor, context_len: int, scale: float) -> Tensor:
    """q [tokens, heads, key_dim] at the last positions of the context; k, v [context, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,chd->htc", q, k) * scale
    positions = torch.arange(context_len - len(q), context_len, device=q.device)
    is_hidden = torch.arange(len(k), device=q.device)[None, :] > positions[:, None]
    return torch.einsum("htc,chd->thd", scores.masked_fill(is_hidden, float("-inf")).softmax(-1), v)


def integer_groups(x: Tensor, activations: str) -> Tensor:
    """x [tokens, features] rounded to integers in groups of 32 columns, and back.

    "mixed" rounds to 8 bits, but leaves a number alone whose square is more than half of its group's sum of
    squares, and then one of which that is true without the first.
    """
    groups = x.reshape(len(x), -1, GROUP)
    if activations != "mixed":
        return _rounded(groups, LEVELS[activations]).flatten(-2)
    rest = groups
    for _ in range(MAX_OUTLIERS):
        squares = rest.square()
        rest = rest.masked_fill(2 * squares > squares.sum(-1, keepdim=True), 0)
    is_outlier = rest != groups
    return torch.where(is_outlier, groups, _rounded(rest, LEVELS["int8"])).flatten(-2)


def _rounded(x: Tensor, levels: float) -> Tensor:
    """Along the last axis: scale = max|x| / levels, code = round(x * (levels / max|x|)), ties to even."""
    largest = x.abs().amax(-1, keepdim=True)
    quotient = torch.full_like(largest, levels) / largest  # levels / largest would multiply by a reciprocal
    inverse = torch.where(largest > 0, quotient, torch.zeros_like(largest))
    return (x * inverse).round() * (largest / levels)


class StateStore:
    """What linear-attention layers keep in each slot: the state after the settled tokens, and each draft."""

    def __init__(self) -> None:
        self._states: dict[tuple[str, int], dict[int, list[Tensor]]] = {}

    def store(self, key: tuple[str, int], slot: int, states: Sequence[Tensor]) -> None:
        """Keep the state after the settled tokens, and after each draft; `key` is the kind and the layer."""
        self._states.setdefault(key, {})[slot] = [state.detach() for state in states]

    def load(self, key: tuple[str, int], slot: int, num_accepted: int) -> Tensor:
        """The state after the settled tokens and the first `num_accepted` drafts."""
        return self._states[key][slot][num_accepted]

    def copy_slot(self, source: int, target: int) -> None:
        """Copy what every layer keeps of one slot to another."""
        for slots in self._states.values():
            slots[target] = list(slots[source])


class PagedCache:
    """Keys and values of all layers, in blocks, rounded to `dtype` as they are stored, but held in float32.

    `dtype` is "f32", "bf16" or "int8" (one scale per position and head). `states` is for the layers that
    keep no keys and values.
    """

    def __init__(self, specs: Sequence[KVSpec], dtype: str, num_blocks: int, block_size: int) -> None:
        self.dtype, self.num_blocks, self.block_size = dtype, num_blocks, block_size
        self.states = StateStore()
        self._keys = [torch.zeros(num_blocks * block_size, s.num_kv_heads, s.key_dim) for s in specs]
        self._values = [torch.zeros(num_blocks * block_size, s.num_kv_heads, s.value_dim) for s in specs]

    def store(self, layer: int, batch: TensorBatch, s: int, keys: Tensor, values: Tensor) -> None:
        """Keep the new positions of sequence s: keys and values [tokens, heads, dim]."""
        slots = self._slots(batch, s)[-len(keys) :]
        self._keys[layer][slots] = self._rounded(keys.detach())
        self._values[layer][slots] = self._rounded(values.detach())

    def load(self, layer: int, batch: TensorBatch, s: int) -> tuple[Tensor, Tensor]:
        """All keys and values of sequence s, [context, heads, dim]."""
        slots = self._slots(batch, s)
        return self._keys[layer][slots], self._values[layer][slots]

    def held_queries(self, queries: Tensor) -> Tensor:
        """Queries as stored keys meet them: beside bf16 keys, each the sum of two bfloat16 numbers."""
        if self.dtype != "bf16":
            return queries
        high = queries.bfloat16().float()
        return high + (queries - high).bfloat16().float()

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block of every layer."""
        size = self.block_size
        for plane in (*self._keys, *self._values):
            plane[target * size : (target + 1) * size] = plane[source * size : (source + 1) * size]

    def _slots(self, batch: TensorBatch, s: int) -> Tensor:
        positions = torch.arange(int(batch.context_lens[s]))
        first_slots = batch.block_tables[s][positions // self.block_size] * self.block_size
        return first_slots + positions % self.block_size

    def _rounded(self, x: Tensor) -> Tensor:
        if self.dtype == "bf16":
            return x.bfloat16().float()
        return _rounded(x, LEVELS["int8"]) if self.dtype == "int8" else x.float()
