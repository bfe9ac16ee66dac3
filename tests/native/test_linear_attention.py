"""The convolution and the gated delta rule: as defined, and the same bits however a sequence is cut."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import pairwise
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jinn import _native
from jinn.ops.protocol import Context, StateSpec
from jinn.ops.reference import ReferenceOps, tensor_batch

from .compare import assert_close, assert_same_bits
from .programs import ISAS, OpProgram, columns, one_sequence, packed_sequences

SMALL = StateSpec(num_key_heads=2, num_value_heads=6, key_dim=8, value_dim=8, conv_kernel=4)
SPECS = [
    SMALL,
    StateSpec(1, 1, 1, 1, 1),
    StateSpec(1, 3, 5, 70, 2),  # two slices, the last one with a part of a vector
    StateSpec(2, 2, 33, 48, 3),
    StateSpec(1, 2, 128, 128, 4),
]
BY_ISA = pytest.mark.parametrize("isa", ISAS)
BY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "x".join(map(str, astuple(spec))))
NUM_ROWS = 70
ALL_ROWS = one_sequence(range(NUM_ROWS))


class Layer:
    """Random weights, and rows of inputs that a token's id chooses from."""

    def __init__(self, spec, seed=0, num_rows=NUM_ROWS):
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        self.spec = spec
        self.taps = normal(spec.conv_dim, spec.conv_kernel) / 2
        self.A_log, self.dt_bias = normal(spec.num_value_heads), normal(spec.num_value_heads)
        self.x = normal(num_rows, spec.conv_dim) * rng.choice([0.1, 1, 3], (num_rows, 1)).astype(np.float32)
        self.a, self.b = (3 * normal(num_rows, spec.num_value_heads) for _ in range(2))

    @property
    def node(self):
        return SimpleNamespace(weight=self.taps, A_log=self.A_log, dt_bias=self.dt_bias)

    @property
    def reference_node(self):
        values = {"weight": self.taps, "A_log": self.A_log, "dt_bias": self.dt_bias}
        return SimpleNamespace(**{name: torch.from_numpy(value) for name, value in values.items()})

    def mixer(self, **settings):
        """A program of both ops."""

        def build(ops, x, a, b):
            convolved = ops.causal_conv1d(x, self.node, Context(), self.spec)
            return [ops.gated_delta_rule(convolved, a, b, self.node, Context(), self.spec)]

        return OpProgram(build, self.x, self.a, self.b, **settings)

    def expected(self, rows):
        """The definition's outputs of one sequence."""
        x, a, b = (torch.from_numpy(values[rows]) for values in (self.x, self.a, self.b))
        ops, ctx = ReferenceOps(), Context(tensor_batch(one_sequence(range(len(rows)))))
        convolved = ops.causal_conv1d(x, self.reference_node, ctx, self.spec)
        return ops.gated_delta_rule(convolved, a, b, self.reference_node, ctx, self.spec).numpy()


class Slots:
    """A program and the states it keeps, all NaN at first."""

    def __init__(self, layer, num_slots=4, max_drafts=4, **settings):
        self.program = layer.mixer(**settings)
        self.states = _native.StateCache([astuple(layer.spec)], num_slots, max_drafts)
        for slot in range(num_slots):
            self.states.fill_slot(slot, 0xFF)

    def step(self, *sequences):
        """Outputs of each (slot, rows, context_len), with num_drafts and num_accepted where there are any."""
        slots, rows, contexts, drafts, accepted = zip(*(((*s, 0, 0)[:5]) for s in sequences), strict=True)
        batch = packed_sequences(list(zip(rows, contexts, strict=True)))
        batch = replace(
            batch,
            state_slots=np.array(slots, np.int32),
            num_drafts=np.array(drafts, np.int32),
            num_accepted=np.array(accepted, np.int32),
        )
        (out,) = self.program.run(batch, states=self.states)
        return np.split(out, np.cumsum([len(r) for r in rows])[:-1])

    def whole(self, slot, rows):
        """Outputs of a sequence in one step."""
        return self.step((slot, rows, len(rows)))[0]


@BY_ISA
@BY_SPEC
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 17, 65])
def test_both_ops_are_as_defined(isa, spec, num_tokens):
    layer = Layer(spec)
    rows = list(range(num_tokens))
    assert_close(Slots(layer, isa=isa).whole(0, rows), layer.expected(rows), 1e-4)


@BY_ISA
@BY_SPEC
def test_the_convolution_alone_is_as_defined(isa, spec):
    layer = Layer(spec)
    states = _native.StateCache([astuple(spec)], 1)
    program = OpProgram(lambda ops, x: [ops.causal_conv1d(x, layer.node, Context(), spec)], layer.x, isa=isa)
    ctx = Context(tensor_batch(ALL_ROWS))
    expected = ReferenceOps().causal_conv1d(torch.from_numpy(layer.x), layer.reference_node, ctx, spec)
    one = replace(ALL_ROWS, **in_slot(0))
    assert_close(program.run(one, states=states)[0], expected.numpy())


def in_slot(slot, num_drafts=0, num_accepted=0):
    """The fields of a batch of one sequence."""
    values = {"state_slots": slot, "num_drafts": num_drafts, "num_accepted": num_accepted}
    return {name: np.array([value], np.int32) for name, value in values.items()}


@BY_ISA
def test_inputs_may_be_columns_of_something_wider(isa):
    """And a model may have several layers with states."""
    layer = Layer(SMALL)

    def wide(values):
        return np.pad(values, ((0, 0), (3, 5)), constant_values=np.nan)

    def build(ops, x, a, b):
        x, a, b = (
            columns(v, 3, w.shape[1]) for v, w in zip((x, a, b), (layer.x, layer.a, layer.b), strict=True)
        )
        for index in range(2):
            ctx = Context(layer=index)
            convolved = ops.causal_conv1d(x, layer.node, ctx, SMALL)
            out = ops.gated_delta_rule(convolved, a, b, layer.node, ctx, SMALL)
        return [out]

    program = OpProgram(build, wide(layer.x), wide(layer.a), wide(layer.b), isa=isa)
    states = _native.StateCache([astuple(SMALL)] * 2, 1)
    states.fill_slot(0, 0xFF)
    (actual,) = program.run(replace(ALL_ROWS, **in_slot(0)), states=states)
    assert_same_bits(actual, Slots(layer, isa=isa).whole(0, range(NUM_ROWS)))


@BY_ISA
@BY_SPEC
def test_a_sequence_may_be_cut_anywhere(isa, spec):
    layer, rng = Layer(spec), Random(0)
    slots = Slots(layer, isa=isa)
    whole = slots.whole(0, range(65))
    cuts = [range(66), [0, 64, 65], *(sorted({0, 65, *rng.sample(range(65), 6)}) for _ in range(3))]
    for cut in cuts:
        parts = [slots.step((1, range(a, b), b))[0] for a, b in pairwise(cut)]
        assert_same_bits(np.concatenate(parts), whole)


@BY_ISA
@BY_SPEC
@pytest.mark.parametrize("num_drafts", [1, 2, 4])
def test_accepted_drafts_count_as_ordinary_tokens(isa, spec, num_drafts):
    """Whatever the drafts were, and with more drafts in the same step that takes them in."""
    layer = Layer(spec)
    slots = Slots(layer, isa=isa)
    right = slots.whole(0, range(30))
    for num_accepted in range(num_drafts + 1):
        wrong = [60 + i for i in range(num_drafts - num_accepted)]
        slots.whole(1, range(10))
        drafted = [*range(10, 11 + num_accepted), *wrong]
        (out,) = slots.step((1, drafted, 10 + len(drafted), num_drafts))
        assert_same_bits(out[: 1 + num_accepted], right[10 : 11 + num_accepted])
        at = 11 + num_accepted
        (out,) = slots.step((1, [*range(at, at + 3), 65], at + 4, 1, num_accepted))
        assert_same_bits(out[:3], right[at : at + 3])
        (out,) = slots.step((1, range(at + 3, 30), 30))
        assert_same_bits(out, right[at + 3 : 30])


@BY_ISA
def test_a_step_of_drafts_alone(isa):
    layer = Layer(SMALL)
    slots = Slots(layer, isa=isa)
    right = slots.whole(0, range(12))
    slots.whole(1, range(8))
    slots.step((1, [8, 9, 66], 11, 3))
    (out,) = slots.step((1, [10, 11, 67], 13, 3, 2))
    assert_same_bits(out[:2], right[10:12])


@BY_ISA
@pytest.mark.parametrize("num_threads", [1, 2])
def test_sequences_of_a_batch_do_not_touch_each_other(isa, num_threads):
    layer = Layer(SMALL)
    slots = Slots(layer, isa=isa, num_threads=num_threads)
    lists = [list(range(20)), list(range(30, 31)), list(range(40, 60))]
    alone = [slots.whole(0, rows) for rows in lists]
    together = slots.step(*((slot, rows, len(rows)) for slot, rows in zip((3, 0, 2), lists, strict=True)))
    for actual, expected in zip(together, alone, strict=True):
        assert_same_bits(actual, expected)
    (first, second) = slots.step((2, [1, 66], 22, 1), (0, [2, 3], 3))
    assert_same_bits(first[:1], slots.whole(1, [*lists[2], 1])[-1:])
    assert_same_bits(second, slots.whole(1, [*lists[1], 2, 3])[-2:])


def test_two_threads_give_the_bits_of_one():
    layer = Layer(StateSpec(2, 4, 16, 128, 4))
    one, two = (Slots(layer, num_threads=n).whole(0, range(65)) for n in (1, 2))
    assert_same_bits(two, one)


def test_a_copied_slot_goes_on_as_the_one_it_came_from():
    layer = Layer(SMALL)
    slots = Slots(layer)
    whole = slots.whole(0, range(40))
    slots.whole(1, range(25))
    slots.states.copy_slot(1, 2)
    for slot in (2, 1):
        (out,) = slots.step((slot, range(25, 40), 40))
        assert_same_bits(out, whole[25:])


def test_a_copy_leaves_drafts_behind():
    layer = Layer(SMALL)
    slots = Slots(layer)
    whole = slots.whole(0, range(40))
    slots.whole(1, range(24))
    slots.step((1, [24, 60, 61], 27, 2))
    slots.states.copy_slot(1, 2)
    (out,) = slots.step((2, range(25, 40), 40))
    assert_same_bits(out, whole[25:])
    slots.states.copy_slot(1, 3)
    with pytest.raises(ValueError, match="more drafts accepted than were kept aside"):
        slots.step((3, [26], 27, 0, 1))


@pytest.mark.parametrize(
    ("sequences", "error"),
    [
        ([(4, [0], 1)], "no such state slot"),
        ([(-1, [0], 1)], "no such state slot"),
        ([(1, [0], 1), (1, [0], 1)], "share a state slot"),
        ([(1, [0, 1], 2, 3)], "more drafts than tokens"),
        ([(1, range(6), 6, 5)], "more drafts than tokens"),
        ([(1, [0], 1, -1)], "more drafts than tokens"),
        ([(0, [5], 7)], "does not go on where its state slot ends"),
        ([(0, [5], 5)], "does not go on where its state slot ends"),
        ([(0, [5], 6, 0, 1)], "more drafts accepted"),
        ([(0, [5], 1, 0, 1)], "more drafts accepted"),
        ([(2, [5], 2)], "does not go on where its state slot ends"),
    ],
)
def test_a_batch_that_lies_about_states_is_refused(sequences, error):
    slots = Slots(Layer(SMALL))
    slots.whole(0, range(5))
    with pytest.raises(ValueError, match=error):
        slots.step(*sequences)
    slots.step((0, [5], 6))


def test_states_must_be_those_of_the_program():
    slots = Slots(Layer(SMALL))
    batch = replace(one_sequence([0]), **in_slot(0))
    other = _native.StateCache([astuple(replace(SMALL, key_dim=16))], 1)
    for states in (None, other):
        with pytest.raises(ValueError, match="expected the states of the program's layers"):
            slots.program.run(batch, states=states)
    with pytest.raises(ValueError, match="expected a state slot"):
        slots.program.run(one_sequence([0]), states=slots.states)


def test_what_a_cache_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="num_slots >= 1"):
        _native.StateCache([astuple(SMALL)], 0)
    with pytest.raises(ValueError, match="whole groups of value heads"):
        _native.StateCache([astuple(replace(SMALL, num_value_heads=3))], 1)
    states = _native.StateCache([astuple(SMALL)], 2)
    assert states.slot_bytes == 4 * (6 * 8 * 16 + 3 * SMALL.conv_dim)
    assert states.log_bytes == 0
    for source, target in [(0, 2), (-1, 0)]:
        with pytest.raises(ValueError, match="no such slot"):
            states.copy_slot(source, target)


@BY_ISA
def test_extreme_gates_stay_finite(isa):
    """A decay of 0 and of 1, beta of 0 and of 1, and keys and queries of zeros."""
    layer = Layer(SMALL)
    layer.a[:] = np.resize([-200, -20, 20, 200], layer.a.shape)
    layer.b[:] = np.resize([-200, 200, 0], layer.b.shape)
    layer.x[5] = 0
    rows = list(range(40))
    assert_close(Slots(layer, isa=isa).whole(0, rows), layer.expected(rows), 1e-4)


FAULTS = {
    "decay": lambda layer: setattr(layer, "A_log", layer.A_log * np.float32(1.001)),
    "dt_bias": lambda layer: setattr(layer, "dt_bias", np.zeros_like(layer.dt_bias)),
    "beta": lambda layer: setattr(layer, "b", layer.b + np.float32(0.01)),
    "taps reversed": lambda layer: setattr(layer, "taps", np.ascontiguousarray(layer.taps[:, ::-1])),
    "q and k swapped": lambda layer: setattr(layer, "x", swapped_halves(layer.x, 2 * 2 * 8)),
    "one row": lambda layer: layer.x.__setitem__(20, layer.x[21]),
}


def swapped_halves(x, cols):
    half = cols // 2
    return np.concatenate([x[:, half:cols], x[:, :half], x[:, cols:]], axis=1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault):
    layer, faulty, rows = Layer(SMALL), Layer(SMALL), list(range(40))
    FAULTS[fault](faulty)
    with pytest.raises(AssertionError):
        assert_close(Slots(faulty).whole(0, rows), layer.expected(rows), 1e-4)
