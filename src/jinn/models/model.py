"""What the engine, the planner and the trainer know of a model, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from jinn.models.parameters import Origin, ParameterSpec
from jinn.ops.protocol import Context, KVSpec, Ops, Value
from jinn.weights.checkpoint import Checkpoint


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

    def origins(self, checkpoint: Checkpoint) -> Mapping[str, Origin]:
        """Where the checkpoint keeps each parameter."""
        ...

    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What each attention layer keeps per token."""
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

    def hidden_states(self, ops: Ops[Value], params: Any, ctx: Context) -> Value:
        """What the head reads, after the last norm: [batch.logit_rows, hidden_size]."""
        ...
