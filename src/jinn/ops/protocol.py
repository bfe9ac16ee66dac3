"""The op set on one page: what a model may ask for, and what each op means.

A value is a 2-D float tensor `[tokens, features]`. The tokens of all sequences are packed end to end, for
training and for serving alike. Heads are attributes of an op: head `h` of `n` occupies columns `h * d` to
`(h + 1) * d`. `reference.py` is the definition of each op; `native.py` records them for the C++ kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Value = TypeVar("Value")
Weight = Any  # what a parameter node's `weight` holds: a torch tensor or a PackedTensor; both have `.shape`
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    """The packed tokens of one step, and where each sequence's keys and values lie.

    Sequence `s` owns tokens `query_start[s]` to `query_start[s + 1]`; their positions are consecutive and end
    at `context_lens[s] - 1`. The key of position `p` lies in block `block_tables[s, p // block_size]`.
    """

    token_ids: IntArray  # [num_tokens]
    positions: IntArray  # [num_tokens]
    query_start: IntArray  # [num_seqs + 1]
    context_lens: IntArray  # [num_seqs]
    block_tables: IntArray  # [num_seqs, max_blocks]
    logit_rows: IntArray  # [num_rows] tokens whose logits are wanted


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: angle of pair i at position p is `p * inv_freq[i]`, in float32.

    Pairs are (i, i + r/2) of the first r = 2 * len(inv_freq) columns of each head, or (2i, 2i + 1) if
    `is_interleaved`; further columns pass through. cos and sin are multiplied by `attention_factor`.
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    is_interleaved: bool = False


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What an attention layer keeps per token: `num_kv_heads` keys of `key_dim`, values of `value_dim`."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """How a token's experts are chosen from their scores, and weighted.

    With `num_groups` > 1 only experts of the best `num_chosen_groups` equal groups may be chosen; a group
    counts as the sum of its two best.
    """

    num_experts_per_tok: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    is_renormalized: bool = True
    num_groups: int = 1
    num_chosen_groups: int = 1
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class Routing(Generic[Value]):
    """Each token's experts in rank order, best first, and what balance losses need."""

    ids: Value  # [tokens, num_experts_per_tok] integers
    weights: Value  # [tokens, num_experts_per_tok]
    scores: Value  # [tokens, num_experts], before the bias


@dataclass(frozen=True, slots=True)
class Context:
    """What a block may know of the step besides its input: the batch, and this layer's place in the cache.

    `batch` and `cache` are None while a Program is recorded. With `cache=None` attention is causal over the
    batch's own keys and values, in their own precision, and differentiable.
    """

    batch: Any = None
    cache: Any = None
    layer: int = 0

    def at_layer(self, layer: int) -> Context:
        return Context(self.batch, self.cache, layer)


class Ops(Protocol[Value]):
    """Ops take and return values; a `node` has a `weight` and may have a `bias`."""

    def embed(self, node: Any, ctx: Context) -> Value:
        """Rows `batch.token_ids` of `weight` [vocab_size, hidden_size], in float32."""
        ...

    def linear(self, x: Value, nodes: Sequence[Any]) -> tuple[Value, ...]:
        """`x @ weight.T + bias` for each node; all read the same x. Accumulates in float32."""
        ...

    def add(self, a: Value, b: Value) -> Value:
        """a + b, in float32."""
        ...

    def silu_mul(self, gate: Value, up: Value) -> Value:
        """gate * sigmoid(gate) * up."""
        ...

    def sigmoid_mul(self, x: Value, gate: Value) -> Value:
        """x * sigmoid(gate); the gate has x's columns, or one for the whole row."""
        ...

    def rms_norm(self, x: Value, node: Any, eps: float) -> Value:
        """`x / sqrt(mean(x^2) + eps) * weight` over runs of len(weight) columns: rows, or heads."""
        ...

    def rope(self, x: Value, ctx: Context, rope: Rope, num_heads: int) -> Value:
        """Rotate each head of x by its token's position."""
        ...

    def attention(self, q: Value, k: Value, v: Value, ctx: Context, spec: KVSpec, scale: float) -> Value:
        """Causal softmax attention, in float32, of q's heads over `spec.num_kv_heads` shared key/value heads.

        k and v are stored in the cache first and read back as stored; query head h uses key/value head
        `h // (num_heads // num_kv_heads)`. Returns [tokens, num_heads * value_dim].
        """
        ...

    def route(self, x: Value, node: Any, spec: RouteSpec) -> Routing[Value]:
        """Choose each token's experts, all in float32 and from x as it is, whatever holds the weights.

        Scores are softmax or sigmoid of `x @ weight.T`; `node.e_score_correction_bias` [num_experts], if
        there is one, is added for choosing alone. Ties go to the lower id. Weights are the chosen scores,
        divided by (their sum + 1e-20) if renormalized, times `scaling`.
        """
        ...

    def experts(self, x: Value, routing: Routing[Value], node: Any) -> Value:
        """Sum over each token's experts of weight * down(silu(gate(x)) * up(x)), added in rank order.

        `node.gate_proj` and `node.up_proj` hold [experts, intermediate_size, hidden_size], `node.down_proj`
        [experts, hidden_size, intermediate_size].
        """
        ...

    def select_rows(self, x: Value, ctx: Context) -> Value:
        """Rows `batch.logit_rows` of x."""
        ...
