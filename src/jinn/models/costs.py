"""What running a model costs: weight bytes that a step reads, and operations by the arithmetic they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from jinn.models.model import Model
from jinn.models.parameters import ParameterSpec
from jinn.models.work import Storage
from jinn.weights.block_formats import BlockFormat
from jinn.weights.checkpoint import Checkpoint

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a model's file with integer activations. An operation is an addition or a multiplication.

    Activations of 12 bits may take a multiplication twice; it counts once, as the work that there is to do.

    Arithmetic is "int8", "bf16" or "f32": what a weight's format is multiplied in; attention takes f32.
    """

    weight_bytes: (
        int  # that a token reads: all but the embedding, unless that is the head too, and other experts
    )
    layer_operations: Mapping[str, float]  # of the linears of all layers, per token, by arithmetic
    head_operations: Mapping[str, float]  # per row of logits, by arithmetic
    model: Model

    def operations(self, num_tokens: int, context_len: int, num_logit_rows: int) -> dict[str, float]:
        """Of `num_tokens` tokens of one sequence, whose last one sees `context_len` positions."""
        linear = sum(self.layer_operations.values()) + sum(self.head_operations.values())
        attention = self.model.flops(num_tokens, context_len) - num_tokens * linear
        total = {"f32": attention}
        for kind, count in self.layer_operations.items():
            total[kind] = total.get(kind, 0.0) + num_tokens * count
        for kind, count in self.head_operations.items():
            total[kind] = total.get(kind, 0.0) + num_logit_rows * count
        return total


def costs(model: Model, checkpoint: Checkpoint) -> Costs:
    """The costs of a checkpoint's tensors. Raises KeyError where it lacks one."""
    specs, origins = model.parameters(), model.origins(checkpoint)
    formats = {name: checkpoint.tensors[origins[name].names[0]].format for name in specs}
    head = _HEAD if _HEAD in specs else _EMBEDDING
    layers: Counter[str] = Counter()
    for name, spec in specs.items():
        if len(spec.shape) > 1 and name.startswith("model.layers."):
            layers[_arithmetic(formats[name])] += 2 * spec.active_size
    return Costs(
        sum(
            _active_bytes(specs[name], formats[name])
            for name in specs
            if (name != _EMBEDDING or head == _EMBEDDING) and not name.startswith("mtp.")
        ),
        layers,
        {_arithmetic(formats[head]): 2.0 * prod(specs[head].shape)},
        model,
    )


def checkpoint_storage(model: Model, checkpoint: Checkpoint) -> Storage:
    """Bytes and arithmetic of each parameter as the checkpoint stores it; vectors are float32 in memory."""
    origins = model.origins(checkpoint)

    def storage(name: str, spec: ParameterSpec) -> tuple[float, str]:
        if len(spec.shape) == 1:
            return 4.0 * prod(spec.shape), "f32"
        stored = checkpoint.tensors[origins[name].names[0]].format
        return prod(spec.shape) / stored.block_elems * stored.block_bytes, _arithmetic(stored)

    return storage


def _active_bytes(spec: ParameterSpec, block_format: BlockFormat) -> int:
    return spec.active_size // block_format.block_elems * block_format.block_bytes


def _arithmetic(block_format: BlockFormat) -> str:
    if block_format.is_quantized:
        return "int8"
    return "bf16" if block_format.name == "BF16" else "f32"
