"""Records a model for the C++ kernels: calls on symbolic values become instructions over planned buffers.

Three steps: `NativeOps` writes down what the model asks for, `fuse` merges neighbours that one kernel can do,
and `compile_program` gives buffers their places and hands everything to C++. No torch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from enum import IntEnum
from heapq import heappop, heappush
from typing import Any

import numpy as np

from jinn import _native
from jinn.models.model import Model
from jinn.ops.protocol import (
    Batch,
    Context,
    FloatArray,
    IntArray,
    KVSpec,
    Rope,
    RouteSpec,
    Routing,
    StateSpec,
)

BatchArrays = tuple[
    IntArray,
    IntArray,
    IntArray,
    IntArray,
    IntArray,
    IntArray,
    IntArray,
    IntArray,
    IntArray,
    FloatArray,
    IntArray,
]

FLOAT_FORMATS = ("F32", "F16", "BF16")
NO_BIAS = np.empty(0, np.float32)
ROW_WISE = {
    "embed", "given_hidden", "quantize", "add", "silu_mul", "sigmoid_mul", "rms_norm", "rope_table", "rope",
    "split_heads", "join_heads", "store_kv", "route", "gather", "combine", "select_rows",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Memory of `row_bytes` per token, or per row whose logits are wanted."""

    row_bytes: int
    is_logits: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class SymbolicValue:
    """Columns of a buffer: a value [tokens, cols] that will be there when the program runs."""

    buffer: Buffer
    cols: int
    first_col: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    """One kernel call: `name` is Program's method, `attributes` what it takes besides values."""

    name: str
    inputs: tuple[SymbolicValue, ...]
    outputs: tuple[SymbolicValue, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


class NativeOps:
    """The op protocol on symbolic values.

    `activations` is how inputs of integer weights are held: int12, mixed, int8, bf16 or f32.
    """

    def __init__(self, activations: str) -> None:
        self.activations = activations
        self.instructions: list[Instruction] = []
        self._activations_of: dict[tuple[SymbolicValue, str, bool], SymbolicValue] = {}
        self._rope_tables: dict[Rope, SymbolicValue] = {}
        self._places_of: dict[SymbolicValue, SymbolicValue] = {}
        self._gathered_of: dict[tuple[SymbolicValue, SymbolicValue, str, bool], SymbolicValue] = {}

    def embed(self, node: Any, ctx: Context) -> SymbolicValue:
        out = _value(node.weight.shape[1])
        return self._record("embed", (), (out,), table=node.weight)[0]

    def linear(self, x: SymbolicValue, nodes: Sequence[Any], ctx: Context) -> tuple[SymbolicValue, ...]:
        outputs = _side_by_side([node.weight.shape[0] for node in nodes], x.buffer.is_logits)
        kinds = [self._activation_kind(node.weight.format) for node in nodes]
        for kind in dict.fromkeys(kinds):
            chosen = [i for i, other in enumerate(kinds) if other == kind]
            self._record(
                "linear",
                (self._activation(x, *kind),),
                tuple(outputs[i] for i in chosen),
                type=kind[0],
                weights=[nodes[i].weight for i in chosen],
                biases=[getattr(nodes[i], "bias", NO_BIAS) for i in chosen],
            )
        self._adapt(x, nodes, outputs)
        return outputs

    def _adapt(self, x: SymbolicValue, nodes: Sequence[Any], outputs: Sequence[SymbolicValue]) -> None:
        """Add what adapters add. Their products with x need nothing of the linear and run beside it."""
        pairs = [
            (y, node.adapters) for y, node in zip(outputs, nodes, strict=True) if hasattr(node, "adapters")
        ]
        if not pairs:
            return
        sums = tuple(y for y, _ in pairs)
        ranks = [max(change.a.shape[0] for change in changes if change) for _, changes in pairs]
        inner = _side_by_side(ranks, x.buffer.is_logits)
        a = [[change and change.a for change in changes] for _, changes in pairs]
        b = [[change and change.b for change in changes] for _, changes in pairs]
        self._record("adapter_linear", (x,), inner, weights=a, is_sum=False)
        self._record("adapter_linear", (*inner, *sums), sums, weights=b, is_sum=True)

    def _activation_kind(self, weight_format: str) -> tuple[str, bool]:
        """How the input of such a weight is held, and whether it is rounded to bfloat16."""
        if self.activations == "f32":
            return "f32", False
        if weight_format == "BF16":
            return "bf16", False
        if weight_format in FLOAT_FORMATS or self.activations == "bf16":
            return "f32", self.activations == "bf16"
        return self.activations, False

    def _activation(self, x: SymbolicValue, kind: str, round_to_bf16: bool) -> SymbolicValue:
        """x as weights read it; made once and shared by all its readers."""
        key = (x, kind, round_to_bf16)
        if key not in self._activations_of:
            held = SymbolicValue(Buffer(_native.activation_stride(kind, x.cols), x.buffer.is_logits), x.cols)
            self._record("quantize", (x,), (held,), type=kind, round_to_bf16=round_to_bf16)
            self._activations_of[key] = held
        return self._activations_of[key]

    def add(self, a: SymbolicValue, b: SymbolicValue) -> SymbolicValue:
        return self._record("add", (a, b), (_value_like(a),))[0]

    def silu_mul(self, gate: SymbolicValue, up: SymbolicValue) -> SymbolicValue:
        return self._record("silu_mul", (gate, up), (_value_like(gate),))[0]

    def sigmoid_mul(self, x: SymbolicValue, gate: SymbolicValue) -> SymbolicValue:
        return self._record("sigmoid_mul", (x, gate), (_value_like(x),))[0]

    def rms_norm(self, x: SymbolicValue, node: Any, eps: float, offset: float = 0.0) -> SymbolicValue:
        weight = node.weight + np.float32(offset)
        return self._record("rms_norm", (x,), (_value_like(x),), weight=weight, eps=eps)[0]

    def rope(self, x: SymbolicValue, ctx: Context, rope: Rope, num_heads: int) -> SymbolicValue:
        if rope not in self._rope_tables:
            table = _value(2 * len(rope.inv_freq))
            self._record(
                "rope_table",
                (),
                (table,),
                inv_freq=list(rope.inv_freq),
                attention_factor=rope.attention_factor,
            )
            self._rope_tables[rope] = table
        return self._record(
            "rope",
            (self._rope_tables[rope], x),
            (_value_like(x),),
            num_pairs=len(rope.inv_freq),
            num_heads=num_heads,
            is_interleaved=rope.is_interleaved,
        )[0]

    def attention(
        self, q: SymbolicValue, k: SymbolicValue, v: SymbolicValue, ctx: Context, spec: KVSpec, scale: float
    ) -> SymbolicValue:
        self._record("store_kv", (k, v), (), layer=ctx.layer)
        out = _value(q.cols // spec.key_dim * spec.value_dim)
        kv_heads = spec.num_kv_heads
        return self._record("attention", (q,), (out,), layer=ctx.layer, num_kv_heads=kv_heads, scale=scale)[0]

    def split_heads(
        self, x: SymbolicValue, num_heads: int, widths: Sequence[int]
    ) -> tuple[SymbolicValue, ...]:
        if num_heads == 1:
            starts = np.cumsum([0, *widths[:-1]]).tolist()
            return tuple(_columns(x, start, width) for start, width in zip(starts, widths, strict=True))
        outputs = _side_by_side([num_heads * width for width in widths], x.buffer.is_logits)
        return self._record("split_heads", (x,), outputs, num_heads=num_heads)

    def join_heads(self, values: Sequence[SymbolicValue], num_heads: int) -> SymbolicValue:
        out = _value(sum(value.cols for value in values), values[0].buffer.is_logits)
        return self._record("join_heads", tuple(values), (out,), num_heads=num_heads)[0]

    def head_linear(self, x: SymbolicValue, node: Any) -> SymbolicValue:
        num_heads, width, _ = node.weight.shape
        kind = self._activation_kind(node.weight.format)
        out = _value(num_heads * width, x.buffer.is_logits)
        held = self._activation(x, *kind)
        return self._record("head_linear", (held,), (out,), type=kind[0], weight=node.weight)[0]

    def causal_conv1d(self, x: SymbolicValue, node: Any, ctx: Context, spec: StateSpec) -> SymbolicValue:
        taps = np.ascontiguousarray(node.weight.T)
        return self._record(
            "causal_conv1d", (x,), (_value_like(x),), layer=ctx.layer, spec=astuple(spec), taps=taps
        )[0]

    def gated_delta_rule(
        self,
        qkv: SymbolicValue,
        a: SymbolicValue,
        b: SymbolicValue,
        node: Any,
        ctx: Context,
        spec: StateSpec,
    ) -> SymbolicValue:
        return self._record(
            "gated_delta_rule",
            (qkv, a, b),
            (_value(spec.num_value_heads * spec.value_dim),),
            layer=ctx.layer,
            spec=astuple(spec),
            decay_rates=np.exp(node.A_log),
            dt_bias=node.dt_bias,
        )[0]

    def route(self, x: SymbolicValue, node: Any, spec: RouteSpec) -> Routing[SymbolicValue]:
        num_experts, num_chosen = node.weight.shape[0], spec.num_experts_per_tok
        is_logits = x.buffer.is_logits
        logits = _value(num_experts, is_logits)
        self._record(
            "linear",
            (self._activation(x, "f32", False),),
            (logits,),
            type="f32",
            weights=[node.weight],
            biases=[NO_BIAS],
        )
        scores, weights, ids = _side_by_side((num_experts, num_chosen, num_chosen), is_logits)
        self._record(
            "route",
            (logits,),
            (scores, weights, ids),
            bias=getattr(node, "e_score_correction_bias", NO_BIAS),
            is_sigmoid=spec.scoring == "sigmoid",
            is_renormalized=spec.is_renormalized,
            num_groups=spec.num_groups,
            num_chosen_groups=spec.num_chosen_groups,
            scaling=spec.scaling,
        )
        return Routing(ids, weights, scores)

    def experts(self, x: SymbolicValue, routing: Routing[SymbolicValue], node: Any) -> SymbolicValue:
        weights = [node.gate_proj.weight, node.up_proj.weight]
        num_experts, inner, _ = weights[0].shape
        places = self._places(routing.ids, num_experts)
        inputs, types = [], []
        for weight in weights:
            kind = self._activation_kind(weight.format)
            inputs += [self._activation(x, *kind), self._gathered(x, routing.ids, places, kind)]
            types.append(kind[0])
        down = node.down_proj.weight
        down_kind, round_to_bf16 = self._activation_kind(down.format)
        held = self._at_places(routing.ids, _native.activation_stride(down_kind, inner), inner)
        self._record(
            "experts_gated_linear",
            (places, *inputs),
            (held,),
            types=types,
            weights=weights,
            out_type=down_kind,
            round_to_bf16=round_to_bf16,
        )
        cols = down.shape[1]
        y = self._at_places(routing.ids, 4 * cols, cols)
        self._record("experts_linear", (places, held), (y,), type=down_kind, weight=down)
        out = _value(cols, routing.ids.buffer.is_logits)
        return self._record("combine", (places, y, routing.weights), (out,))[0]

    def _gathered(
        self, x: SymbolicValue, ids: SymbolicValue, places: SymbolicValue, kind: tuple[str, bool]
    ) -> SymbolicValue:
        """x as weights read it, at the places of each token's experts."""
        key = (ids, x, *kind)
        if key not in self._gathered_of:
            gathered = self._at_places(ids, _native.activation_stride(kind[0], x.cols), x.cols)
            held = self._activation(x, *kind)
            self._record("gather", (places, held), (gathered,), type=kind[0], cols=x.cols)
            self._gathered_of[key] = gathered
        return self._gathered_of[key]

    def _places(self, ids: SymbolicValue, num_experts: int) -> SymbolicValue:
        """Where each token's experts are computed; made once for each routing."""
        if ids not in self._places_of:
            row_bytes = _native.places_row_bytes(ids.cols)
            places = SymbolicValue(Buffer(row_bytes, ids.buffer.is_logits), row_bytes // 4)
            self._record("group_rows", (ids,), (places,), num_experts=num_experts)
            self._places_of[ids] = places
        return self._places_of[ids]

    def _at_places(self, ids: SymbolicValue, place_bytes: int, cols: int) -> SymbolicValue:
        """A buffer that has `place_bytes` for each place."""
        row_bytes = _native.places_per_choice * ids.cols * _round_up(place_bytes, 64)
        return SymbolicValue(Buffer(row_bytes, ids.buffer.is_logits), cols)

    def given_hidden(self, cols: int, ctx: Context) -> SymbolicValue:
        return self._record("given_hidden", (), (_value(cols),))[0]

    def select_rows(self, x: SymbolicValue, ctx: Context) -> SymbolicValue:
        return self._record("select_rows", (x,), (_value(x.cols, is_logits=True),))[0]

    def _record(
        self,
        name: str,
        inputs: tuple[SymbolicValue, ...],
        outputs: tuple[SymbolicValue, ...],
        **attributes: Any,
    ) -> tuple[SymbolicValue, ...]:
        self.instructions.append(Instruction(name, inputs, outputs, attributes))
        return outputs


@dataclass(frozen=True, slots=True)
class Recording:
    """A model's instructions, and the values that the caller reads when they have run."""

    instructions: list[Instruction]
    logits: SymbolicValue  # [batch.logit_rows, vocab_size], or what else is wanted of these rows
    hidden: SymbolicValue | None = None  # [tokens, hidden_size], what the head read

    @property
    def outputs(self) -> tuple[SymbolicValue, ...]:
        """The values that must outlive the last instruction."""
        return (self.logits,) if self.hidden is None else (self.logits, self.hidden)


def record(model: Model, parameters: Any, activations: str, keeps_hidden: bool = False) -> Recording:
    """What computes the model's logits and, for drafting, its hidden states."""
    ops, ctx = NativeOps(activations), Context()
    if not keeps_hidden:
        return Recording(ops.instructions, model.forward(ops, parameters, ctx))
    hidden = model.hidden(ops, parameters, ctx)
    return Recording(ops.instructions, model.head(ops, parameters, hidden, ctx), hidden)


def record_hidden(model: Model, parameters: Any, activations: str) -> Recording:
    """What computes the hidden states of `batch.logit_rows` in place of their logits."""
    ops, ctx = NativeOps(activations), Context()
    return Recording(ops.instructions, ops.select_rows(model.hidden(ops, parameters, ctx), ctx))


def record_predict(model: Model, parameters: Any, activations: str) -> Recording:
    """What computes the logits and hidden states of the model's multi-token prediction module."""
    ops, ctx = NativeOps(activations), Context()
    hidden = model.predict(ops, parameters, ctx)
    return Recording(ops.instructions, model.head(ops, parameters, hidden, ctx), hidden)


def fuse(recording: Recording) -> Recording:
    """The same numbers by fewer instructions, and in less memory."""
    return _in_place(_fuse_adds(_fuse_gates(recording)))


def _fuse_gates(recording: Recording) -> Recording:
    """Gate and up, silu(gate) * up and its quantization become one, which keeps gate and up in the cache.

    Where nothing else reads any of them, and weights are integers: float ones lay out their input anew.
    """
    uses, readers = _uses(recording), {ins.inputs: ins for ins in recording.instructions}
    replaced: dict[Instruction, Instruction | None] = {}
    for linear in recording.instructions:
        if linear.name != "linear" or linear.attributes["type"] in ("bf16", "f32"):
            continue
        silu_mul = readers.get(linear.outputs)
        if silu_mul is None or silu_mul.name != "silu_mul" or uses[linear.outputs[0].buffer] > 2:
            continue
        quantize = readers.get(silu_mul.outputs)
        if quantize is None or quantize.name != "quantize" or uses[silu_mul.outputs[0].buffer] > 1:
            continue
        out = {"out_type": quantize.attributes["type"], "round_to_bf16": quantize.attributes["round_to_bf16"]}
        replaced[linear] = Instruction(
            "gated_linear", linear.inputs, quantize.outputs, {**linear.attributes, **out}
        )
        replaced[silu_mul] = replaced[quantize] = None
    return _replace(recording, replaced)


def _fuse_adds(recording: Recording) -> Recording:
    """An add of a linear's only use moves into the linear, which then adds before it stores: the same sum.

    The add's other input must be there by then. Not the sum of a mixture's experts: a shared expert's linear
    runs beside them.
    """
    instructions = recording.instructions
    uses = _uses(recording)
    producers = {out: index for index, ins in enumerate(instructions) for out in ins.outputs}
    last_write = {out.buffer: index for out, index in producers.items()}
    mixed = {out.buffer for ins in instructions if ins.name == "combine" for out in ins.outputs}
    replaced: dict[Instruction, Instruction | None] = {}
    for add in instructions:
        if add.name != "add":
            continue
        residual, addend = add.inputs
        index = producers.get(addend)
        if index is None or uses[addend.buffer] > 1 or last_write[residual.buffer] >= index:
            continue
        if residual.buffer in mixed:
            continue
        linear = instructions[index]
        if linear.name == "linear" and len(linear.outputs) == 1:
            replaced[linear] = replace(linear, inputs=(*linear.inputs, residual), outputs=add.outputs)
            replaced[add] = None
    return _replace(recording, replaced)


def _in_place(recording: Recording) -> Recording:
    """Norms and rotations of what nothing else reads later are written over it, while it is in the cache."""
    kept = {value.buffer for value in recording.outputs}
    reads: defaultdict[Buffer, list[tuple[SymbolicValue, int]]] = defaultdict(list)
    for index, ins in enumerate(recording.instructions):
        for value in ins.inputs:
            reads[value.buffer].append((value, index))
    moved: dict[Buffer, SymbolicValue] = {}
    instructions = []
    for index, ins in enumerate(recording.instructions):
        inputs, outputs = tuple(_moved(value, moved) for value in ins.inputs), ins.outputs
        if ins.name in ("rms_norm", "rope") and max(_touching(reads, ins.inputs[-1])) == index:
            place, out = inputs[-1], outputs[0]
            if place.buffer not in kept and out.buffer not in kept:
                moved[out.buffer], outputs = place, (place,)
        instructions.append(replace(ins, inputs=inputs, outputs=outputs))
    return replace(recording, instructions=instructions)


def _moved(value: SymbolicValue, moved: dict[Buffer, SymbolicValue]) -> SymbolicValue:
    """Where the value lies if its buffer has become the columns of another one."""
    place = moved.get(value.buffer)
    return value if place is None else _columns(place, value.first_col, value.cols)


def _uses(recording: Recording) -> Counter[Buffer]:
    uses = Counter(value.buffer for ins in recording.instructions for value in ins.inputs)
    uses.update(value.buffer for value in recording.outputs)
    return uses


def _replace(recording: Recording, replaced: dict[Instruction, Instruction | None]) -> Recording:
    instructions = (replaced.get(ins, ins) for ins in recording.instructions)
    return replace(recording, instructions=[ins for ins in instructions if ins is not None])


class Kind(IntEnum):
    """What may share a stage. Where several kinds are ready, the lowest goes first."""

    TOKEN_ROWS = 0  # row-wise: one after another on a few rows at a time
    LOGIT_ROWS = 1  # the same on the rows whose logits are wanted
    WHOLE = 2  # little work, in one piece
    PIECES = 3  # much work, in pieces that may be computed in any order


def stages(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Instructions of one kind that need no barrier between them, each as early as may be."""
    followers, num_needed = _dependencies(instructions)
    ready: dict[Kind, list[int]] = {kind: [] for kind in Kind}

    def add(index: int) -> None:
        heappush(ready[_kind(instructions[index])], index)

    def finish(index: int) -> None:
        for follower in followers[index]:
            num_needed[follower] -= 1
            if not num_needed[follower]:
                add(follower)

    for index in [index for index, count in enumerate(num_needed) if not count]:
        add(index)
    runs: list[list[Instruction]] = []
    while kinds := [kind for kind in Kind if ready[kind]]:
        kind, run = kinds[0], []
        if kind in (Kind.TOKEN_ROWS, Kind.LOGIT_ROWS):
            while ready[kind]:  # what one finishes may go on in the same stage
                run.append(heappop(ready[kind]))
                finish(run[-1])
        else:
            run, ready[kind] = sorted(ready[kind]), []
            for index in run:
                finish(index)
        runs.append([instructions[index] for index in run])
    return runs


def _kind(instruction: Instruction) -> Kind:
    if instruction.name in ROW_WISE:
        is_logits = (instruction.outputs or instruction.inputs)[0].buffer.is_logits
        return Kind.LOGIT_ROWS if is_logits else Kind.TOKEN_ROWS
    return Kind.WHOLE if instruction.name == "group_rows" else Kind.PIECES


def _dependencies(instructions: Sequence[Instruction]) -> tuple[list[list[int]], list[int]]:
    """Of each instruction: which later ones wait for it, and how many earlier ones it waits for.

    It waits for what wrote the columns it reads, and for what wrote or read those it writes.
    """
    followers: list[list[int]] = [[] for _ in instructions]
    num_needed: list[int] = []
    written: defaultdict[Buffer, list[tuple[SymbolicValue, int]]] = defaultdict(list)
    read: defaultdict[Buffer, list[tuple[SymbolicValue, int]]] = defaultdict(list)
    stored: dict[int, int] = {}  # what stores each layer's keys and values, which attention reads
    for index, ins in enumerate(instructions):
        needed = {i for value in ins.inputs for i in _touching(written, value)}
        for value in ins.outputs:
            needed.update(_touching(written, value), _touching(read, value))
        if ins.name == "attention":
            needed.add(stored[ins.attributes["layer"]])
        elif ins.name == "store_kv":
            stored[ins.attributes["layer"]] = index
        for value in ins.inputs:
            read[value.buffer].append((value, index))
        for value in ins.outputs:
            written[value.buffer].append((value, index))
        for i in needed:
            followers[i].append(index)
        num_needed.append(len(needed))
    return followers, num_needed


def _touching(accesses: dict[Buffer, list[tuple[SymbolicValue, int]]], value: SymbolicValue) -> list[int]:
    """The instructions whose access is to some of the value's columns."""
    first, end = value.first_col, value.first_col + value.cols
    return [
        index
        for other, index in accesses.get(value.buffer, ())
        if other.first_col < end and first < other.first_col + other.cols
    ]


def plan_slots(recording: Recording, runs: Sequence[Sequence[Instruction]]) -> dict[Buffer, int]:
    """A slot of memory for each buffer: those never alive in the same one of these stages may share one."""
    last_use = {
        value.buffer: i for i, run in enumerate(runs) for ins in run for value in ins.inputs + ins.outputs
    }
    last_use.update((value.buffer, len(runs)) for value in recording.outputs)
    slots: dict[Buffer, int] = {}
    sizes: list[tuple[bool, int]] = []
    free: list[int] = []
    for index, run in enumerate(runs):
        for value in (value for ins in run for value in ins.outputs):
            if value.buffer not in slots:
                slots[value.buffer] = _take_slot(value.buffer, free, sizes)
        touched = dict.fromkeys(value.buffer for ins in run for value in ins.inputs + ins.outputs)
        free.extend(slots[buffer] for buffer in touched if last_use[buffer] == index)
    return slots


def _take_slot(buffer: Buffer, free: list[int], sizes: list[tuple[bool, int]]) -> int:
    """The free slot that wastes least, or a new one."""
    fitting = [
        slot for slot in free if sizes[slot][0] == buffer.is_logits and sizes[slot][1] >= buffer.row_bytes
    ]
    if fitting:
        slot = min(fitting, key=lambda candidate: sizes[candidate][1])
        free.remove(slot)
        return slot
    sizes.append((buffer.is_logits, buffer.row_bytes))
    return len(sizes) - 1


def compile_program(
    recording: Recording, pool: _native.ThreadPool, kernels: _native.Kernels
) -> _native.Program:
    """The C++ Program of a recording."""
    program, runs = _native.Program(pool, kernels), stages(recording.instructions)
    slots = plan_slots(recording, runs)
    buffers = {
        buffer: program.add_buffer(buffer.is_logits, buffer.row_bytes, slot) for buffer, slot in slots.items()
    }

    def buffer_of(value: SymbolicValue) -> int:
        return buffers[value.buffer]

    def operand(value: SymbolicValue) -> _native.Operand:
        return _native.Operand(buffer_of(value), value.first_col, value.cols)

    for run in runs:
        program.begin_stage()
        for instruction in run:
            _emit(program, instruction, operand, buffer_of)
    program.set_logits(operand(recording.logits))
    if recording.hidden is not None:
        program.set_hidden(operand(recording.hidden))
    return program


def _emit(
    program: _native.Program,
    instruction: Instruction,
    operand: Callable[[SymbolicValue], _native.Operand],
    buffer_of: Callable[[SymbolicValue], int],
) -> None:
    """Activations, places and rope tables go to C++ as buffers, all other values as operands."""
    inputs, outputs, attributes = instruction.inputs, instruction.outputs, instruction.attributes
    match instruction.name:
        case "quantize":
            program.quantize(operand(inputs[0]), out=buffer_of(outputs[0]), **attributes)
        case "linear":
            residual = operand(inputs[1]) if len(inputs) > 1 else _native.Operand()
            program.linear(
                buffer_of(inputs[0]), outputs=list(map(operand, outputs)), residual=residual, **attributes
            )
        case "adapter_linear":
            read = inputs[: len(outputs)] if attributes["is_sum"] else inputs * len(outputs)
            program.adapter_linear(
                list(map(operand, read)), outputs=list(map(operand, outputs)), **attributes
            )
        case "group_rows":
            program.group_rows(operand(inputs[0]), places=buffer_of(outputs[0]), **attributes)
        case "gather" | "experts_linear":
            emit = getattr(program, instruction.name)
            emit(buffer_of(inputs[0]), buffer_of(inputs[1]), buffer_of(outputs[0]), **attributes)
        case "gated_linear":
            program.gated_linear(buffer_of(inputs[0]), out=buffer_of(outputs[0]), **attributes)
        case "experts_gated_linear":
            experts_places, *input_buffers = map(buffer_of, inputs)
            others = {name: value for name, value in attributes.items() if name != "types"}
            typed = list(zip(input_buffers[::2], input_buffers[1::2], attributes["types"], strict=True))
            program.experts_gated_linear(experts_places, inputs=typed, out=buffer_of(outputs[0]), **others)
        case "combine":
            places, y, weights = inputs
            program.combine(buffer_of(places), buffer_of(y), operand(weights), operand(outputs[0]))
        case "head_linear":
            program.head_linear(buffer_of(inputs[0]), out=operand(outputs[0]), **attributes)
        case "split_heads":
            program.split_heads(operand(inputs[0]), outputs=list(map(operand, outputs)), **attributes)
        case "join_heads":
            program.join_heads(list(map(operand, inputs)), out=operand(outputs[0]), **attributes)
        case "rope_table":
            program.rope_table(out=buffer_of(outputs[0]), **attributes)
        case "rope":
            program.rope(buffer_of(inputs[0]), x=operand(inputs[1]), out=operand(outputs[0]), **attributes)
        case name:
            getattr(program, name)(*map(operand, inputs + outputs), **attributes)


def batch_arrays(batch: Batch) -> BatchArrays:
    """The batch as `_native.run` and `_native.profile` take it."""
    return (
        batch.token_ids,
        batch.positions,
        batch.query_start,
        batch.context_lens,
        batch.block_tables,
        batch.logit_rows,
        batch.state_slots,
        batch.num_drafts,
        batch.num_accepted,
        batch.hidden,
        batch.adapters,
    )


def _value(cols: int, is_logits: bool = False) -> SymbolicValue:
    return SymbolicValue(Buffer(4 * _round_up(cols, 16), is_logits), cols)


def _side_by_side(widths: Sequence[int], is_logits: bool) -> tuple[SymbolicValue, ...]:
    """Values of these widths in one buffer, each from a multiple of 16 columns."""
    padded = [_round_up(width, 16) for width in widths]
    buffer = Buffer(4 * sum(padded), is_logits)
    starts = np.cumsum([0, *padded[:-1]]).tolist()
    return tuple(SymbolicValue(buffer, width, start) for width, start in zip(widths, starts, strict=True))


def _columns(value: SymbolicValue, first_col: int, cols: int) -> SymbolicValue:
    return SymbolicValue(value.buffer, cols, value.first_col + first_col)


def _value_like(value: SymbolicValue) -> SymbolicValue:
    return _value(value.cols, value.buffer.is_logits)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
