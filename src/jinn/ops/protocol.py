"""The op set on one page: what a model may ask for, and what each op means.

A value is a 2-D float tensor `[tokens, features]`. The tokens of all sequences are packed end to end, for
training and for serving alike. Heads are attributes of an op: head `h` of `n` occupies columns `h * d` to
`(h + 1) * d`. `reference.py` is the definition of each op; `native.py` records them for the C++ kernels.
A parameter node's `weight` is a torch tensor for one and a PackedTensor for the other; both have `.shape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

NO_ADAPTER = -1

Value = TypeVar("Value")
IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


def _no_integers() -> IntArray:
    return np.empty(0, np.int32)


def _no_hidden() -> FloatArray:
    return np.empty((0, 0), np.float32)


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
    # Of models with recurrent states, empty for others. Sequence `s` keeps its states in `state_slots[s]`.
    # Its last `num_drafts[s]` tokens may turn out wrong: the slot takes in the tokens before them, and keeps
    # aside what each of them would change. Before anything else it takes in the first `num_accepted[s]` of
    # those kept aside by the step before. A sequence that starts at position 0 finds its states zero.
    state_slots: IntArray = field(default_factory=_no_integers)  # [num_seqs]
    num_drafts: IntArray = field(default_factory=_no_integers)  # [num_seqs]
    num_accepted: IntArray = field(default_factory=_no_integers)  # [num_seqs]
    hidden: FloatArray = field(default_factory=_no_hidden)  # [num_tokens, hidden_size]; see given_hidden
    # Which of the loaded adapters each sequence's tokens go through, or NO_ADAPTER; see LowRank. Sequences of
    # one adapter should lie side by side, so that its weights are read once.
    adapters: IntArray = field(default_factory=_no_integers)  # [num_seqs], or empty: none has any


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
class StateSpec:
    """What a linear-attention layer keeps per sequence, in float32.

    The state [num_value_heads, key_dim, value_dim] of the delta rule, and the last `conv_kernel - 1` inputs
    of the convolution over the columns of q, k and v.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int

    @property
    def conv_dim(self) -> int:
        """Columns of q, k and v together."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a linear: `b @ (a @ x)`, in float32 (LoRA, arXiv 2106.09685)."""

    a: Any  # [rank, in]
    b: Any  # [out, rank], times the adapter's scale


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

    `layer` counts the layers of one kind: those that keep keys and values, or those that keep states.
    `batch` and `cache` are None while a Program is recorded. With `cache=None` attention is causal over the
    batch's own keys and values, in their own precision, states begin at zero, and all is differentiable.
    """

    batch: Any = None
    cache: Any = None
    layer: int = 0

    def at_layer(self, layer: int) -> Context:
        return Context(self.batch, self.cache, layer)


class Ops(Protocol[Value]):
    """Ops take and return values; a `node` has a `weight` and may have a `bias`.

    One that a linear reads may have `adapters`: each loaded adapter's LowRank, or None where it adds nothing.
    """

    def embed(self, node: Any, ctx: Context) -> Value:
        """Rows `batch.token_ids` of `weight` [vocab_size, hidden_size], in float32."""
        ...

    def linear(self, x: Value, nodes: Sequence[Any], ctx: Context) -> tuple[Value, ...]:
        """`x @ weight.T + bias` for each node; all read the same x. Accumulates in float32.

        Where nodes have `adapters`, x is [tokens, in], and each token's adapter adds to its row.
        """
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

    def rms_norm(self, x: Value, node: Any, eps: float, offset: float = 0.0) -> Value:
        """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over runs of len(weight) columns: rows or heads."""
        ...

    def rope(self, x: Value, ctx: Context, rope: Rope, num_heads: int) -> Value:
        """Rotate each head of x by its token's position."""
        ...

    def attention(self, q: Value, k: Value, v: Value, ctx: Context, spec: KVSpec, scale: float) -> Value:
        """Causal softmax attention, in float32, of q's heads over `spec.num_kv_heads` shared key/value heads.

        k and v are stored in the cache first and read back as stored; query head h uses key/value head
        `h // (num_heads // num_kv_heads)`. Beside a bf16 cache each number of q is held as the sum of two
        bfloat16 ones, its nearest and that of the rest. Returns [tokens, num_heads * value_dim].
        """
        ...

    def split_heads(self, x: Value, num_heads: int, widths: Sequence[int]) -> tuple[Value, ...]:
        """Each head's columns cut into runs of these widths; value i has run i of all heads, side by side."""
        ...

    def join_heads(self, values: Sequence[Value], num_heads: int) -> Value:
        """The inverse of `split_heads`: a head's columns are its columns of all values, in order."""
        ...

    def head_linear(self, x: Value, node: Any) -> Value:
        """Each head by a matrix of its own: head h of the result is `x_h @ weight[h].T`.

        `weight` is [num_heads, out, in]; x has num_heads * in columns, the result num_heads * out.
        """
        ...

    def causal_conv1d(self, x: Value, node: Any, ctx: Context, spec: StateSpec) -> Value:
        """`y[t, c] = silu(sum over j of weight[c, j] * x[t - conv_kernel + 1 + j, c])`, in each sequence.

        `node.weight` is [conv_dim, conv_kernel], x [tokens, conv_dim]; before a sequence's first token lie
        the inputs its state keeps.
        """
        ...

    def gated_delta_rule(
        self, qkv: Value, a: Value, b: Value, node: Any, ctx: Context, spec: StateSpec
    ) -> Value:
        """The gated delta rule (2412.06464) token by token, float32 [tokens, num_value_heads * value_dim].

        qkv [tokens, conv_dim] has all q heads, then all k heads [key_dim], then all v heads [value_dim]; a
        and b are [tokens, num_value_heads], `node.A_log` and `node.dt_bias` [num_value_heads]. Value head h
        uses key head `h // (num_value_heads // num_key_heads)`. Per token and value head, with a state S
        [key_dim, value_dim]:

            q = q / sqrt(sum(q^2) + 1e-6) / sqrt(key_dim);  k = k / sqrt(sum(k^2) + 1e-6)
            S = S * exp(-exp(A_log) * softplus(a + dt_bias))
            S = S + k outer (sigmoid(b) * (v - S.T k));  out = S.T q
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

    def given_hidden(self, cols: int, ctx: Context) -> Value:
        """`batch.hidden` [tokens, cols]: hidden states of an earlier step, that a draft module reads."""
        ...

    def select_rows(self, x: Value, ctx: Context) -> Value:
        """Rows `batch.logit_rows` of x."""
        ...
