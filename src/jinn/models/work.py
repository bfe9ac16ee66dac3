"""The work of each layer, from a model's own declarations: matrices, attention, recurrence, and what is kept.

Planning and pricing read these; nothing here knows a family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

from jinn.models.model import Model
from jinn.models.parameters import Parallel, ParameterSpec
from jinn.ops.protocol import KVSpec, StateSpec

_LAYER, _EMBEDDING, _HEAD = "model.layers.", "model.embed_tokens.weight", "lm_head.weight"

Storage = Callable[[str, ParameterSpec], tuple[float, str]]
"""A parameter's bytes, and the arithmetic it is multiplied in ("bf16", "fp8", "int8", "f32")."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """`copies` matrices [rows, cols], of which a token meets `active`; experts have more than one."""

    rows: int
    cols: int
    copies: int
    active: int
    num_bytes: float  # of all copies
    arithmetic: str
    parallel: Parallel

    @property
    def is_expert(self) -> bool:
        return self.parallel == "expert"

    @property
    def flops(self) -> float:
        """Operations per token: an addition and a multiplication per weight."""
        return 2.0 * self.active * self.rows * self.cols


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One block, as often as the model has it.

    `attention_flops` are per token and position that it sees; `expanded_flops` the same where keys and
    values are not kept as latents but expanded for each head, which is cheaper for many new tokens (MLA).
    """

    count: int
    matrices: tuple[Matrix, ...]
    vector_bytes: float  # norms, biases
    kv: KVSpec | None
    state_values: int  # of the delta rule's state, float32, per sequence
    conv_values: int  # of the convolution's tail, per sequence
    attention_flops: float
    expanded_flops: float

    @property
    def weight_bytes(self) -> float:
        return self.vector_bytes + sum(matrix.num_bytes for matrix in self.matrices)

    @property
    def state_flops(self) -> float:
        """Of the gated delta rule per token: decay, read, update and output cost 1 + 2 + 2 + 2 per entry."""
        return 7.0 * self.state_values


@dataclass(frozen=True, slots=True)
class ModelWork:
    """A whole model: its kinds of layers, the embedding that is looked up, the head that is multiplied."""

    layers: tuple[LayerWork, ...]
    embedding_bytes: float  # 0 where the head is the same matrix
    head: Matrix
    hidden_size: int
    total_parameters: int
    active_parameters: int

    @property
    def num_layers(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def weight_bytes(self) -> float:
        layers = sum(layer.count * layer.weight_bytes for layer in self.layers)
        return self.embedding_bytes + self.head.num_bytes + layers


def model_work(model: Model, storage: Storage) -> ModelWork:
    """The work of a model whose parameters are stored as `storage` says."""
    specs = model.parameters()
    layers: dict[int, dict[str, ParameterSpec]] = {}
    for name, spec in specs.items():
        if name.startswith(_LAYER):
            layers.setdefault(int(name[len(_LAYER) :].split(".", 1)[0]), {})[name] = spec
    kv, states, attention = list(model.kv_specs()), list(model.state_specs()), _attention_flops(model)
    kinds: Counter[LayerWork] = Counter()
    for index in sorted(layers):
        is_recurrent = any(".linear_attn." in name for name in layers[index])
        kept = None if is_recurrent else kv.pop(0)
        state = states.pop(0) if is_recurrent else None
        kinds[_layer_work(layers[index], storage, kept, state, attention)] += 1
    head = _HEAD if _HEAD in specs else _EMBEDDING
    return ModelWork(
        tuple(replace(layer, count=count) for layer, count in kinds.items()),
        0.0 if head == _EMBEDDING else storage(_EMBEDDING, specs[_EMBEDDING])[0],
        _matrix(head, specs[head], storage),
        model.hidden_size,
        sum(prod(spec.shape) for name, spec in specs.items() if not name.startswith("mtp.")),
        model.active_parameters(),
    )


def _attention_flops(model: Model) -> float:
    """Per attention layer, token and position: what one more position adds to a token's operations."""
    num_layers = len(model.kv_specs())
    return (model.flops(1, 2) - model.flops(1, 1)) / num_layers if num_layers else 0.0


def _layer_work(
    specs: Mapping[str, ParameterSpec],
    storage: Storage,
    kv: KVSpec | None,
    state: StateSpec | None,
    attention_flops: float,
) -> LayerWork:
    matrices = tuple(_matrix(name, spec, storage) for name, spec in specs.items() if len(spec.shape) > 1)
    vectors = sum(storage(name, spec)[0] for name, spec in specs.items() if len(spec.shape) == 1)
    if kv is not None:
        expanded = _expanded_flops(specs, kv, attention_flops)
        return LayerWork(1, matrices, vectors, kv, 0, 0, attention_flops, expanded)
    if state is None:
        raise ValueError("a layer keeps neither keys and values nor a state")
    values = state.num_value_heads * state.key_dim * state.value_dim
    tail = (state.conv_kernel - 1) * state.conv_dim
    return LayerWork(1, matrices, vectors, None, values, tail, 0.0, 0.0)


def _expanded_flops(specs: Mapping[str, ParameterSpec], kv: KVSpec, absorbed: float) -> float:
    """MLA's latent is expanded for each head to its key's plain columns and its value.

    Absorbed, a head's score and value take 2 * (key_dim + value_dim) of the latent; expanded, 2 * (plain +
    rotary + value columns).
    """
    keys = [spec.shape for name, spec in specs.items() if ".k_b_proj." in name]
    values = [spec.shape for name, spec in specs.items() if ".v_b_proj." in name]
    if not keys or not values:
        return absorbed
    num_heads, _, plain = keys[0]
    return 2.0 * num_heads * (plain + kv.key_dim - kv.value_dim + values[0][1])


def _matrix(name: str, spec: ParameterSpec, storage: Storage) -> Matrix:
    *copies, rows, cols = spec.shape
    count = prod(copies)
    num_bytes, arithmetic = storage(name, spec)
    active = count if spec.num_experts_per_tok is None else spec.num_experts_per_tok
    return Matrix(rows, cols, count, active, num_bytes, arithmetic, spec.parallel)
