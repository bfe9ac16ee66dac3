"""Recording, fusing and planning: whatever shares memory or is merged, the numbers stay the same."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import numpy as np
import pytest

from jinn import _native
from jinn.engine.loading import load_parameters
from jinn.models.layers import mixture
from jinn.models.parameters import tree
from jinn.models.registry import model_of
from jinn.models.sources import parameter_sources
from jinn.ops import native as native_ops
from jinn.ops.native import (
    Buffer,
    Instruction,
    NativeOps,
    Recording,
    SymbolicValue,
    batch_arrays,
    compile_program,
    fuse,
    plan_slots,
    record,
    stages,
)
from jinn.ops.protocol import Context, Rope, RouteSpec
from jinn.weights.checkpoint import open_checkpoint
from native.compare import assert_same_bits
from native.programs import (
    POOLS,
    OpProgram,
    one_sequence,
    pack,
    pack_experts,
    packed_sequences,
    parameter,
)
from tiny import TinyLlama, tiny_llama_gguf

ACTIVATIONS = pytest.mark.parametrize("activations", ["int12", "mixed", "int8", "bf16", "f32"])
KERNELS = _native.choose_kernels("")
TINY = TinyLlama(num_hidden_layers=3)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A function from an activation mode to a tiny llama's recording."""
    path = tiny_llama_gguf(tmp_path_factory.mktemp("planning") / "tiny.gguf", TINY, "Q4_1")
    with open_checkpoint(path) as checkpoint:
        model = model_of(checkpoint)
        parameters = tree(
            load_parameters(parameter_sources(model, checkpoint), POOLS[1], lambda loaded, total: None)
        )
    return lambda activations: record(model, parameters, activations)


def check_plan(recording, slots):
    """Raise AssertionError if buffers that are alive in the same stage share a slot."""
    alive: dict[Buffer, list[int]] = {}
    runs = stages(recording.instructions)
    for stage, run in enumerate(runs):
        for value in (value for ins in run for value in ins.inputs + ins.outputs):
            alive.setdefault(value.buffer, []).append(stage)
    for output in recording.outputs:
        alive[output.buffer].append(len(runs))
    assert set(alive) == set(slots), "a buffer has no slot"
    buffers = list(alive)
    for i, a in enumerate(buffers):
        for b in buffers[:i]:
            if slots[a] != slots[b]:
                continue
            assert a.is_logits == b.is_logits, "rows of two kinds share a slot"
            assert max(alive[a]) < min(alive[b]) or max(alive[b]) < min(alive[a]), (
                "two live buffers share a slot"
            )


@ACTIVATIONS
def test_buffers_share_memory_only_when_never_alive_together(recorded, activations):
    recording = recorded(activations)
    for program in (recording, fuse(recording)):
        slots = plan_slots(program, stages(program.instructions))
        check_plan(program, slots)
        assert len(set(slots.values())) <= len(slots) / 3, "layers do not reuse memory"


def test_the_check_of_plans_finds_a_shared_slot(recorded):
    recording = recorded("int8")
    slots = plan_slots(recording, stages(recording.instructions))
    adds = [ins for ins in recording.instructions if ins.name == "add"]
    for a, b in ((add.inputs[0].buffer, add.outputs[0].buffer) for add in adds):
        with pytest.raises(AssertionError, match="share a slot"):
            check_plan(recording, {**slots, a: slots[b]})


def test_a_plan_does_not_grow_with_the_layers(tmp_path):
    numbers = []
    for layers in (2, 6):
        path = tiny_llama_gguf(tmp_path / f"{layers}.gguf", TinyLlama(num_hidden_layers=layers), "Q8_0")
        with open_checkpoint(path) as checkpoint:
            model = model_of(checkpoint)
            parameters = load_parameters(
                parameter_sources(model, checkpoint), POOLS[1], lambda loaded, total: None
            )
        recording = fuse(record(model, tree(parameters), "int8"))
        slots = plan_slots(recording, stages(recording.instructions))
        numbers.append(len(set(slots.values())))
    assert numbers[0] == numbers[1]


@ACTIVATIONS
def test_fuse_merges_every_residual_add_and_keeps_the_bits(recorded, activations):
    recording = recorded(activations)
    fused = fuse(recording)
    assert names(recording).count("add") == 2 * TINY.num_hidden_layers
    assert names(fused).count("add") == 0
    assert_same_bits(run(fused), run(recording))


@pytest.mark.parametrize("activations", ["int12", "mixed", "int8"])
def test_fuse_merges_every_gate_of_integer_weights(recorded, activations):
    fused = names(fuse(recorded(activations)))
    assert fused.count("gated_linear") == TINY.num_hidden_layers
    assert "silu_mul" not in fused
    assert fused.count("quantize") == 3 * TINY.num_hidden_layers + 1


@pytest.mark.parametrize("also_read", ["gate", "up", "product"])
def test_fuse_leaves_gates_that_something_else_reads(also_read):
    weight = parameter(pack(np.ones((32, 32)), "Q8_0"))
    ops = NativeOps("int12")
    gate, up = ops.linear(ops.embed(weight, Context()), [weight, weight], Context())
    product = ops.silu_mul(gate, up)
    (down,) = ops.linear(product, [weight], Context())
    out = ops.add(down, {"gate": gate, "up": up, "product": product}[also_read])
    assert "silu_mul" in names(fuse(Recording(ops.instructions, out)))


def test_rotations_are_written_over_what_they_rotate(recorded):
    rotations = [ins for ins in fuse(recorded("int12")).instructions if ins.name == "rope"]
    assert len(rotations) == 2 * TINY.num_hidden_layers
    for ins in rotations:
        x, out = ins.inputs[-1], ins.outputs[0]
        assert (x.buffer, x.first_col, x.cols) == (out.buffer, out.first_col, out.cols)


@pytest.mark.parametrize("is_read", [False, True])
def test_a_norm_leaves_what_is_read_later(is_read):
    ops = NativeOps("int12")
    x = ops.embed(parameter(pack(np.ones((32, 32)))), Context())
    normed = ops.rms_norm(x, parameter(np.ones(32, np.float32)), 1e-5)
    out = ops.add(normed, x if is_read else normed)
    (norm,) = (ins for ins in fuse(Recording(ops.instructions, out)).instructions if ins.name == "rms_norm")
    assert (norm.outputs[0].buffer is x.buffer) != is_read


@ACTIVATIONS
def test_sharing_memory_keeps_the_bits(recorded, activations, monkeypatch):
    recording = recorded(activations)
    shared = run(recording)
    monkeypatch.setattr(native_ops, "plan_slots", apart)
    assert_same_bits(run(recording), shared)


def test_an_input_is_quantized_once_for_all_its_readers(recorded):
    """Four inputs per layer are read as int8: q/k/v's, o's, gate/up's and down's; and the head's."""
    recorded_names = names(recorded("int8"))
    assert recorded_names.count("quantize") == 4 * TINY.num_hidden_layers + 1
    assert recorded_names.count("linear") == 4 * TINY.num_hidden_layers + 1
    assert recorded_names.count("rope_table") == 1


def test_a_token_takes_five_barriers_a_layer(recorded):
    """q/k/v, attention, o, gate/up and down are computed by all threads, what lies between by one."""
    program = compile_program(fuse(recorded("int12")), POOLS[2], KERNELS)
    blocks = _native.KVCache([(2, 16, 16)] * TINY.num_hidden_layers, "bf16", 8, 16)
    before = program.num_barriers
    _native.run(program, blocks, None, TINY.vocab_size, batch_arrays(one_sequence([7])))
    assert program.num_barriers - before <= 5 * TINY.num_hidden_layers + 1


def test_a_shared_expert_is_computed_beside_the_others():
    experts = SimpleNamespace(
        gate_proj=parameter(pack_experts(np.ones((4, 32, 32)))),
        up_proj=parameter(pack_experts(np.ones((4, 32, 32)))),
        down_proj=parameter(pack_experts(np.ones((4, 32, 32)))),
    )
    router, linear = parameter(pack(np.ones((4, 32)))), parameter(pack(np.ones((32, 32))))
    shared = SimpleNamespace(gate_proj=linear, up_proj=linear, down_proj=linear)
    ops = NativeOps("f32")
    x = ops.embed(parameter(pack(np.ones((4, 32)))), Context())
    mlp = SimpleNamespace(gate=router, experts=experts)
    out = mixture(ops, mlp, x, Context(), RouteSpec(2), shared)
    large = [
        names
        for run in stages(fuse(Recording(ops.instructions, out)).instructions)
        if {"linear", "experts_gated_linear", "experts_linear"} & (names := {ins.name for ins in run})
    ]
    assert large == [{"linear"}, {"experts_gated_linear", "linear"}, {"experts_linear"}]


def test_attention_waits_for_what_it_reads(recorded):
    instructions = recorded("int12").instructions
    stage_of = {ins: stage for stage, run in enumerate(stages(instructions)) for ins in run}
    stores = [ins for ins in instructions if ins.name == "store_kv"]
    attentions = [ins for ins in instructions if ins.name == "attention"]
    assert len(stores) == TINY.num_hidden_layers
    pairs = zip(stores, attentions, strict=True)
    assert all(stage_of[store] < stage_of[attention] for store, attention in pairs)


def names(recording):
    return [ins.name for ins in recording.instructions]


def run(recording):
    """Logits of two sequences."""
    program = compile_program(recording, POOLS[2], KERNELS)
    batch = packed_sequences([(range(3, 40), 37), (range(100, 105), 5)])
    blocks = _native.KVCache([(2, 16, 16)] * TINY.num_hidden_layers, "bf16", 8, 16)
    return _native.run(program, blocks, None, TINY.vocab_size, batch_arrays(batch)).copy()


def apart(recording, _stages):
    """A slot of its own for each buffer."""
    buffers = dict.fromkeys(v.buffer for ins in recording.instructions for v in ins.inputs + ins.outputs)
    return {buffer: slot for slot, buffer in enumerate(buffers)}


def random_graph(seed, ops, x):
    """Some ops on random earlier values."""
    rng = Random(seed)
    weights = [
        parameter(pack(np.random.default_rng(i).standard_normal((32, 32)) / 6, "Q8_0")) for i in range(3)
    ]
    norm = parameter(np.linspace(0.5, 1.5, 32, dtype=np.float32))
    rope = Rope((1.0, 0.1, 0.01, 0.001))
    values = [x]
    for _ in range(12):
        a, b = rng.choice(values[-4:]), rng.choice(values)
        match rng.choice(
            ("add", "add", "linear", "linear", "linears", "mlp", "silu_mul", "rms_norm", "rope")
        ):
            case "add":
                values.append(ops.add(a, b))
            case "linear":
                values += ops.linear(a, [rng.choice(weights)], Context())
            case "linears":
                values += ops.linear(a, weights[:2], Context())
            case "mlp":
                gated = ops.silu_mul(*ops.linear(a, weights[:2], Context()))
                values += [gated] if rng.random() < 0.2 else []
                values += ops.linear(gated, weights[2:], Context())
            case "silu_mul":
                values.append(ops.silu_mul(a, b))
            case "rms_norm":
                values.append(ops.rms_norm(a, norm, 1e-5))
            case "rope":
                values.append(ops.rope(a, Context(), rope, 4))
    return [ops.rms_norm(ops.add(values[-1], rng.choice(values)), norm, 1e-5)]


@pytest.mark.parametrize("seed", range(40))
def test_any_graph_computes_the_same_fused_and_in_shared_memory(seed, monkeypatch):
    x = np.random.default_rng(seed).standard_normal((20, 32)).astype(np.float32)

    def build(ops, x):
        return random_graph(seed, ops, x)

    batch = one_sequence(range(20))
    (shared,) = OpProgram(build, x, is_poisoned=False).run(batch)
    (fused,) = OpProgram(build, x, is_poisoned=False, is_fused=True, num_threads=2).run(batch)
    monkeypatch.setattr(native_ops, "plan_slots", apart)
    (plain,) = OpProgram(build, x).run(batch)
    assert_same_bits(shared, plain)
    assert_same_bits(fused, plain)


def test_an_unknown_kernel_is_an_error():
    value = SymbolicValue(Buffer(64), 16)
    with pytest.raises(AttributeError, match="conv"):
        compile_program(Recording([Instruction("conv", (), (value,))], value), POOLS[1], KERNELS)
