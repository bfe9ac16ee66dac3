"""The time of one step on one chip of an instance: a roofline per kind of op, and what lies beside.

Every op takes max(operations / (peak * efficiency), bytes / (bandwidth * efficiency)). To their sum come
exchanges between chips (tensor, expert and pipeline parallelism) and fixed times per layer, step and request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from jinn.models.work import LayerWork, Matrix
from jinn.plan.chips import Chip
from jinn.plan.efficiency import Efficiency
from jinn.plan.shapes import KV_BYTES, Shape, kv_values

ACTIVATION_BYTES = 2  # bf16 between ops


@dataclass(frozen=True, slots=True)
class Placement:
    """How an instance splits a model over `chips`.

    tp splits every matrix, pp the layers, dp the sequences; ep spreads the experts over that many of the
    tp * dp chips of a stage. With dp = 1 and ep = 1, experts are split as other matrices are.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def chips(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        parts = {"TP": self.tp, "PP": self.pp, "DP": self.dp, "EP": self.ep}
        return " ".join(f"{name}{size}" for name, size in parts.items() if size > 1) or "one chip"


@dataclass(frozen=True, slots=True)
class Step:
    """What each of the dp ranks works on: tokens, the positions each sees in the mean, and whose they are."""

    num_tokens: float
    context: float
    num_seqs: float
    num_logit_rows: float
    is_prefill: bool

    @classmethod
    def prefill(cls, num_tokens: float, context: float, num_seqs: float = 1.0) -> Step:
        """Reads `num_tokens` of prompts; a token sees `context` positions in the mean."""
        return cls(num_tokens, context, num_seqs, num_seqs, True)

    @classmethod
    def decode(cls, num_seqs: float, context: float, tokens_per_seq: int = 1) -> Step:
        """One token of each sequence, or a token and its drafts."""
        tokens = num_seqs * tokens_per_seq
        return cls(tokens, context, num_seqs, tokens, False)

    def part(self, share: float) -> Step:
        """That share of the sequences and tokens."""
        return Step(
            self.num_tokens * share,
            self.context,
            self.num_seqs * share,
            self.num_logit_rows * share,
            self.is_prefill,
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """A chip as an engine uses it."""

    chip: Chip
    efficiency: Efficiency

    def seconds(
        self, flops: float, arithmetic: str, share: float, num_bytes: float, of_bandwidth: float
    ) -> float:
        """The roofline of one op."""
        compute = flops / (self.chip.peak(arithmetic) * share) if flops else 0.0
        memory = num_bytes / (self.chip.fact("bandwidth") * of_bandwidth) if num_bytes else 0.0
        return max(compute, memory)

    def link(self, num_chips: int) -> float:
        """Bytes per second, one way, that each of `num_chips` chips reaches."""
        name = "scaleup" if num_chips <= self.chip.scaleup_size else "scaleout"
        return self.chip.fact(name) * self.efficiency.link


def step_seconds(shape: Shape, machine: Machine, placement: Placement, step: Step) -> dict[str, float]:
    """Seconds of a step on one pipeline stage's chip times the stages, by kind; they add up.

    With two half batches that take turns (`overlap`), the shorter of computing and exchanging experts hides
    behind the other to that share.
    """
    alternates = machine.efficiency.overlap > 0 and placement.ep > 1
    if not alternates:
        return _stage_times(shape, machine, placement, step)
    times = {kind: 2 * t for kind, t in _stage_times(shape, machine, placement, step.part(0.5)).items()}
    exchange = times["expert exchange"]
    others = sum(times.values()) - exchange
    times["expert exchange"] = exchange - machine.efficiency.overlap * min(exchange, others)
    return times


def _stage_times(shape: Shape, machine: Machine, placement: Placement, step: Step) -> dict[str, float]:
    times = dict.fromkeys(
        ("linears", "attention", "recurrence", "experts", "head", "activations", "tensor exchange",
         "expert exchange", "stage exchange", "overhead"), 0.0
    )  # fmt: skip
    for layer in shape.work.layers:
        for kind, seconds in _layer_times(shape, layer, machine, placement, step).items():
            times[kind] += layer.count * seconds
    efficiency = machine.efficiency
    head = shape.work.head
    times["head"] += _matrix_seconds(head, machine, placement.tp, step.num_logit_rows)
    hidden_bytes = step.num_tokens * shape.work.hidden_size * ACTIVATION_BYTES
    if placement.pp > 1:
        hop = hidden_bytes / machine.link(placement.chips) + efficiency.collective
        times["stage exchange"] += (placement.pp - 1) * hop
    times["overhead"] += (
        shape.work.num_layers * efficiency.layer + efficiency.step + step.num_seqs * efficiency.request
    )
    return times


def _layer_times(
    shape: Shape, layer: LayerWork, machine: Machine, placement: Placement, step: Step
) -> Mapping[str, float]:
    linears = [matrix for matrix in layer.matrices if not matrix.is_expert]
    experts = [matrix for matrix in layer.matrices if matrix.is_expert]
    times = {
        "linears": sum(
            _matrix_seconds(matrix, machine, _split(matrix, placement), step.num_tokens) for matrix in linears
        ),
        "attention": _attention_seconds(shape, layer, machine, placement, step),
        "recurrence": _recurrence_seconds(layer, machine, placement, step),
        "activations": _activation_seconds(shape, layer, machine, placement, step),
    }
    if placement.tp > 1:
        # an all-reduce after attention and one after the MLP, as a ring
        times["tensor exchange"] = 2 * _all_reduce_seconds(shape, machine, placement, step)
    if experts:
        times["experts"] = sum(_expert_seconds(m, machine, placement, step) for m in experts)
        if placement.ep > 1:
            times["expert exchange"] = _exchange_seconds(shape, experts[0], machine, placement, step)
    return times


def _split(matrix: Matrix, placement: Placement) -> int:
    """Chips that share a matrix; each has all of a replicated one."""
    return 1 if matrix.parallel == "replicated" else placement.tp


def _matrix_seconds(matrix: Matrix, machine: Machine, split: int, num_tokens: float) -> float:
    """Fewer rows than a tile cost as much as a tile, unless few rows are multiplied in another way."""
    padded = max(num_tokens, machine.efficiency.tile)
    return machine.seconds(
        _rows_worth(num_tokens, padded, machine.efficiency) * matrix.flops / split,
        matrix.arithmetic,
        machine.efficiency.linear,
        matrix.num_bytes / split,
        machine.efficiency.weights,
    )


def _rows_worth(num_rows: float, padded: float, efficiency: Efficiency) -> float:
    """How many of many rows take as long as these, which fill tiles of `padded` rows."""
    return min(efficiency.few * num_rows, padded + efficiency.unpack) if num_rows else 0.0


def distinct_experts(num_experts: int, num_experts_per_tok: int, num_tokens: float) -> float:
    """Experts that any of the tokens chose, if all are equally likely: E(1 - (1 - k/E)^T)."""
    missed = float((1 - num_experts_per_tok / num_experts) ** num_tokens)
    return num_experts * (1 - missed)


def _expert_seconds(matrix: Matrix, machine: Machine, placement: Placement, step: Step) -> float:
    """The tokens of all dp ranks meet at the experts; each chip has its share of experts, or of each of them.

    An expert's tokens fill whole tiles of rows, so that in the mean half a tile of each expert is empty.
    """
    chips = placement.tp * placement.dp
    tokens = step.num_tokens * (placement.dp if placement.ep > 1 else 1)
    read_by = chips if placement.ep > 1 else placement.tp
    hit = distinct_experts(matrix.copies, matrix.active, tokens)
    rows = tokens * matrix.active / hit if hit else 0.0
    padded = rows + (machine.efficiency.tile - 1) / 2
    return machine.seconds(
        hit * _rows_worth(rows, padded, machine.efficiency) * 2 * matrix.rows * matrix.cols / read_by,
        matrix.arithmetic,
        machine.efficiency.experts,
        matrix.num_bytes * hit / matrix.copies / read_by,
        machine.efficiency.weights,
    )


def _attention_seconds(
    shape: Shape, layer: LayerWork, machine: Machine, placement: Placement, step: Step
) -> float:
    """Scores and values in bf16; keys and values are read once per sequence. MLA takes the cheaper form."""
    if layer.kv is None:
        return 0.0
    per_token = layer.expanded_flops if step.is_prefill else layer.attention_flops
    flops = step.num_tokens * step.context * per_token / placement.tp
    kv_split = min(placement.tp, layer.kv.num_kv_heads)
    positions = step.num_seqs * step.context
    num_bytes = positions * kv_values(layer.kv) * KV_BYTES[shape.kv_dtype] / kv_split
    arithmetic = machine.efficiency.attention_arithmetic
    return machine.seconds(flops, arithmetic, machine.efficiency.attention, num_bytes, machine.efficiency.kv)


def _recurrence_seconds(layer: LayerWork, machine: Machine, placement: Placement, step: Step) -> float:
    """States are read and written once per sequence and step, in float32."""
    num_bytes = 2 * step.num_seqs * (4 * layer.state_values + 2 * layer.conv_values) / placement.tp
    flops = step.num_tokens * layer.state_flops / placement.tp
    arithmetic = machine.efficiency.attention_arithmetic
    return machine.seconds(flops, arithmetic, machine.efficiency.attention, num_bytes, machine.efficiency.kv)


def _activation_seconds(
    shape: Shape, layer: LayerWork, machine: Machine, placement: Placement, step: Step
) -> float:
    """What ops write and others read again, besides the residual stream's four passes of norms and adds."""
    split = placement.tp
    inner = sum(matrix.active * (matrix.rows + matrix.cols) for matrix in layer.matrices) / split
    stream = 8 * shape.work.hidden_size
    num_bytes = step.num_tokens * (inner + stream) * ACTIVATION_BYTES
    return machine.seconds(0.0, "bf16", 1.0, num_bytes, machine.efficiency.weights)


def _all_reduce_seconds(shape: Shape, machine: Machine, placement: Placement, step: Step) -> float:
    """A ring sends 2(n - 1)/n of the data per chip."""
    n = placement.tp
    num_bytes = 2 * (n - 1) / n * step.num_tokens * shape.work.hidden_size * ACTIVATION_BYTES
    return num_bytes / machine.link(n) + machine.efficiency.collective


def _exchange_seconds(
    shape: Shape, expert: Matrix, machine: Machine, placement: Placement, step: Step
) -> float:
    """Dispatch in the experts' arithmetic, combine in bf16; through scale-up links, and once per node beyond.

    A token goes to each node that has one of its experts once while prompts are read, and to each expert's
    chip while generating, where latency counts (DeepEP's two modes).
    """
    dispatch = 1 if expert.arithmetic in ("fp8", "int8") else ACTIVATION_BYTES
    token_bytes = shape.work.hidden_size * (dispatch + ACTIVATION_BYTES)
    tokens = step.num_tokens / placement.tp
    within = machine.chip.scaleup_size
    nodes = max(1, placement.ep / within)
    copies = expert.active * (1 - 1 / placement.ep)
    inside = tokens * copies * token_bytes / (machine.link(within) if within > 1 else inf)
    outside = 0.0
    if nodes > 1:
        sent = float(expert.active)
        if step.is_prefill:
            sent = nodes * (1 - (1 - 1 / nodes) ** expert.active)
        outside = tokens * sent * (1 - 1 / nodes) * token_bytes / machine.link(placement.ep)
    return max(inside, outside) + 2 * machine.efficiency.collective


def total(times: Mapping[str, float]) -> float:
    return sum(times.values())
