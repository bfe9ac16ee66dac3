"""What the engine, the planner and the trainer know of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jinn.models.parameters import Layout, Origin, ParameterSpec
from jinn.ops.protocol import Context, KVSpec, Ops, StateSpec, Value


class Model(Protocol):
    """A family's frozen config with its blocks. Nothing here holds weights."""

    @property
    def family(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int:
        """Positions the model was made for."""
        ...

    def parameters(self) -> Mapping[str, ParameterSpec]:
        """Every parameter by its Hugging Face checkpoint key."""
        ...

    def origins(self, layout: Layout) -> Mapping[str, Origin]:
        """Where a file keeps each parameter: an open checkpoint, or a `NewFile` that is to be written."""
        ...

    def ignores(self, tensor: str, layout: Layout) -> bool:
        """Whether such a file may have this tensor besides those of `parameters`."""
        ...

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each attention layer keeps per token."""
        ...

    def state_specs(self) -> tuple[StateSpec, ...]:
        """What each linear-attention layer keeps per sequence."""
        ...

    def active_parameters(self) -> int:
        """Parameters that one token reads, embeddings included."""
        ...

    def flops(self, num_tokens: int, context_len: int) -> float:
        """Operations to compute `num_tokens` new tokens, the last of which sees `context_len` positions."""
        ...

    def forward(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """Logits [batch.logit_rows, vocab_size]."""
        ...

    def hidden(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """What the head reads: [tokens, hidden_size] after the final norm."""
        ...

    def head(self, ops: Ops[Value], params: Any, hidden: Value, ctx: Context) -> Value:
        """Logits [batch.logit_rows, vocab_size] of hidden states [tokens, hidden_size]."""
        ...

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint has a module that predicts one more token (multi-token prediction)."""
        ...

    def without_prediction(self) -> Model:
        """The same model, to be loaded without that module."""
        ...

    def predict(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """The multi-token prediction module's hidden states [tokens, hidden_size], for `head` to read.

        Row i has the token `batch.token_ids[i]`, and `batch.hidden[i]`, what `hidden` (or this module, in
        a chain of drafts) gave for the position before it. Its keys and values are `kv_specs()`'s last.
        """
        ...
