"""Records a model for the C++ kernels: calls on symbolic values become instructions over planned buffers.

Three steps: `NativeOps` writes down what the model asks for, `fuse` merges neighbours that one kernel can do,
and `compile_program` gives buffers their places and hands everything to C++. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jinn import _native
from jinn.models.model import Model
from jinn.ops.protocol import Context, KVSpec, Rope

FLOAT_FORMATS = ("F32", "F16", "BF16")
ROW_WISE = {
    "embed", "quantize", "add", "silu_mul", "rms_norm", "rope_table", "rope", "store_kv", "select_rows",
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

    `activations` is how inputs of integer weights are held: int12, int8, bf16 or f32.
    """

    def __init__(self, activations: str = "int12") -> None:
        self.activations = activations
        self.instructions: list[Instruction] = []
        self._activations_of: dict[tuple[SymbolicValue, str, bool], SymbolicValue] = {}
        self._rope_tables: dict[Rope, SymbolicValue] = {}

    def embed(self, node: Any, ctx: Context) -> SymbolicValue:
        out = _value(node.weight.shape[1])
        return self._record("embed", (), (out,), table=node.weight)[0]

    def linear(self, x: SymbolicValue, nodes: Sequence[Any]) -> tuple[SymbolicValue, ...]:
        widths = [node.weight.shape[0] for node in nodes]
        padded = [_round_up(width, 16) for width in widths]
        buffer = Buffer(4 * sum(padded), x.buffer.is_logits)
        starts = np.cumsum([0, *padded[:-1]]).tolist()
        outputs = tuple(
            SymbolicValue(buffer, width, start) for width, start in zip(widths, starts, strict=True)
        )
        kinds = [self._activation_kind(node.weight.format) for node in nodes]
        for kind in dict.fromkeys(kinds):
            chosen = [i for i, other in enumerate(kinds) if other == kind]
            self._record(
                "linear",
                (self._activation(x, *kind),),
                tuple(outputs[i] for i in chosen),
                type=kind[0],
                weights=[nodes[i].weight for i in chosen],
                biases=[getattr(nodes[i], "bias", np.empty(0, np.float32)) for i in chosen],
            )
        return outputs

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

    def rms_norm(self, x: SymbolicValue, node: Any, eps: float) -> SymbolicValue:
        return self._record("rms_norm", (x,), (_value_like(x),), weight=node.weight, eps=eps)[0]

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


def record(model: Model, parameters: Any, activations: str) -> tuple[list[Instruction], SymbolicValue]:
    """The model's instructions, and the value that holds its logits."""
    ops = NativeOps(activations)
    logits = model.forward(ops, parameters, Context())
    return ops.instructions, logits


def fuse(instructions: Sequence[Instruction]) -> list[Instruction]:
    """An add of a linear's only use moves into the linear, which then adds before it stores: the same sum.

    The add's other input must be there by then.
    """
    uses = Counter(value.buffer for ins in instructions for value in ins.inputs)
    producers = {out: index for index, ins in enumerate(instructions) for out in ins.outputs}
    last_write = {out.buffer: index for out, index in producers.items()}
    replaced: dict[Instruction, Instruction | None] = {}
    for add in instructions:
        if add.name != "add":
            continue
        residual, addend = add.inputs
        index = producers.get(addend)
        if index is None or uses[addend.buffer] > 1 or last_write[residual.buffer] >= index:
            continue
        linear = instructions[index]
        if linear.name == "linear" and len(linear.outputs) == 1:
            replaced[linear] = replace(linear, inputs=(*linear.inputs, residual), outputs=add.outputs)
            replaced[add] = None
    fused = (replaced.get(ins, ins) for ins in instructions)
    return [ins for ins in fused if ins is not None]


def stages(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Runs of instructions that need no barrier between them.

    Row-wise instructions on the same kind of rows run one after another on a few rows at a time; anything
    else has a stage to itself.
    """
    runs: list[list[Instruction]] = []
    last_kind = None
    for instruction in instructions:
        is_logits = (instruction.outputs or instruction.inputs)[0].buffer.is_logits
        kind = is_logits if instruction.name in ROW_WISE else None
        if kind is None or kind != last_kind:
            runs.append([])
        runs[-1].append(instruction)
        last_kind = kind
    return runs


def plan_slots(instructions: Sequence[Instruction], output: SymbolicValue) -> dict[Buffer, int]:
    """A slot of memory for each buffer: buffers that are never alive in the same stage may share one."""
    runs = stages(instructions)
    last_use = {
        value.buffer: i for i, run in enumerate(runs) for ins in run for value in ins.inputs + ins.outputs
    }
    last_use[output.buffer] = len(runs)
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
    instructions: Sequence[Instruction],
    output: SymbolicValue,
    pool: _native.ThreadPool,
    kernels: _native.Kernels,
) -> _native.Program:
    """The C++ Program of these instructions."""
    program = _native.Program(pool, kernels)
    slots = plan_slots(instructions, output)
    buffers = {
        buffer: program.add_buffer(buffer.is_logits, buffer.row_bytes, slot) for buffer, slot in slots.items()
    }

    def buffer_of(value: SymbolicValue) -> int:
        return buffers[value.buffer]

    def operand(value: SymbolicValue) -> _native.Operand:
        return _native.Operand(buffer_of(value), value.first_col, value.cols)

    for run in stages(instructions):
        program.begin_stage()
        for instruction in run:
            _emit(program, instruction, operand, buffer_of)
    program.set_output(operand(output))
    return program


def _emit(
    program: _native.Program,
    instruction: Instruction,
    operand: Callable[[SymbolicValue], _native.Operand],
    buffer_of: Callable[[SymbolicValue], int],
) -> None:
    """Activations and rope tables go to C++ as buffers, all other values as operands."""
    inputs, outputs, attributes = instruction.inputs, instruction.outputs, instruction.attributes
    match instruction.name:
        case "quantize":
            program.quantize(operand(inputs[0]), out=buffer_of(outputs[0]), **attributes)
        case "linear":
            residual = operand(inputs[1]) if len(inputs) > 1 else _native.Operand()
            program.linear(
                buffer_of(inputs[0]), outputs=list(map(operand, outputs)), residual=residual, **attributes
            )
        case "rope_table":
            program.rope_table(out=buffer_of(outputs[0]), **attributes)
        case "rope":
            program.rope(buffer_of(inputs[0]), x=operand(inputs[1]), out=operand(outputs[0]), **attributes)
        case name:
            getattr(program, name)(*map(operand, inputs + outputs), **attributes)


def _value(cols: int, is_logits: bool = False) -> SymbolicValue:
    return SymbolicValue(Buffer(4 * _round_up(cols, 16), is_logits), cols)


def _value_like(value: SymbolicValue) -> SymbolicValue:
    return _value(value.cols, value.buffer.is_logits)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
