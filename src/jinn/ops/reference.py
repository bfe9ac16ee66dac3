"""The definition of each op: the shortest correct torch, forward and gradient, on any device.

`activations` repeats what the native kernels do to a linear's input, so that both can be compared closely:
"int8" and "int12" round it to 8 or 12 bits in groups of 32 where the weight is quantized, "bf16" to
bfloat16, "f32" leaves it alone. `PagedCache` is the plain twin of the native cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from jinn.ops.protocol import Batch, Context, KVSpec, Rope, RouteSpec, Routing

GROUP = 32
LEVELS = {"int8": 127.0, "int12": 2032.0}
FLOAT_FORMATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """A `Batch` as int64 tensors."""

    token_ids: Tensor  # [num_tokens]
    positions: Tensor  # [num_tokens]
    query_start: Tensor  # [num_seqs + 1]
    context_lens: Tensor  # [num_seqs]
    block_tables: Tensor  # [num_seqs, max_blocks]
    logit_rows: Tensor  # [num_rows]


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
    )


class ReferenceOps:
    """The op protocol on torch tensors [tokens, features]; `ctx.batch` is a `TensorBatch`.

    A weight may name its format as `weight.format`, as PackedTensor does; without one it counts as F32.
    """

    def __init__(self, activations: str = "f32") -> None:
        self.activations = activations

    def embed(self, node: Any, ctx: Context) -> Tensor:
        return functional.embedding(ctx.batch.token_ids, node.weight).float()

    def linear(self, x: Tensor, nodes: Sequence[Any]) -> tuple[Tensor, ...]:
        outputs = []
        for node in nodes:
            held = self.held(x, getattr(node.weight, "format", "F32"))
            y: Tensor = held @ node.weight.float().T
            bias = getattr(node, "bias", None)
            outputs.append(y if bias is None else y + bias.float())
        return tuple(outputs)

    def held(self, x: Tensor, weight_format: str) -> Tensor:
        """x as a weight of this format reads it."""
        if self.activations in LEVELS and weight_format not in FLOAT_FORMATS:
            return integer_groups(x, LEVELS[self.activations])
        if self.activations == "bf16" or (self.activations in LEVELS and weight_format == "BF16"):
            return x.bfloat16().float()
        return x

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate.sigmoid()

    def rms_norm(self, x: Tensor, node: Any, eps: float) -> Tensor:
        runs = x.reshape(len(x), -1, node.weight.shape[0])
        scaled = runs * torch.rsqrt(runs.square().mean(-1, keepdim=True) + eps)
        y: Tensor = scaled * node.weight
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
            mine = slice(int(ctx.batch.query_start[s]), int(ctx.batch.query_start[s + 1]))
            context_len = int(ctx.batch.context_lens[s])
            seen_keys, seen_values = keys[mine], values[mine]
            if ctx.cache is not None:
                ctx.cache.store(ctx.layer, ctx.batch, s, seen_keys, seen_values)
                seen_keys, seen_values = ctx.cache.load(ctx.layer, ctx.batch, s)
            outputs.append(_attend(queries[mine], seen_keys, seen_values, context_len, scale))
        return torch.cat(outputs).flatten(-2)

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

    def select_rows(self, x: Tensor, ctx: Context) -> Tensor:
        rows: Tensor = x[ctx.batch.logit_rows]
        return rows


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


def integer_groups(x: Tensor, levels: float) -> Tensor:
    """x [tokens, features] rounded to integers up to `levels` in groups of 32 columns, and back."""
    return _rounded(x.reshape(len(x), -1, GROUP), levels).flatten(-2)


def _rounded(x: Tensor, levels: float) -> Tensor:
    """Along the last axis: scale = max|x| / levels, code = round(x * (levels / max|x|)), ties to even."""
    largest = x.abs().amax(-1, keepdim=True)
    quotient = torch.full_like(largest, levels) / largest  # levels / largest would multiply by a reciprocal
    inverse = torch.where(largest > 0, quotient, torch.zeros_like(largest))
    return (x * inverse).round() * (largest / levels)


class PagedCache:
    """Keys and values of all layers, in blocks, rounded to `dtype` as they are stored, but held in float32.

    `dtype` is "f32", "bf16" or "int8" (one scale per position and head).
    """

    def __init__(self, specs: Sequence[KVSpec], dtype: str, num_blocks: int, block_size: int) -> None:
        self.dtype, self.num_blocks, self.block_size = dtype, num_blocks, block_size
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
