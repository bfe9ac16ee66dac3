"""add, silu_mul, sigmoid_mul and rms_norm against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jinn.ops.reference import ReferenceOps

from .compare import assert_close, assert_same_bits
from .programs import ISAS, OpProgram, columns, parameter, run_op

BY_ISA = pytest.mark.parametrize("isa", ISAS)
WIDTHS = pytest.mark.parametrize("cols", [1, 2, 15, 16, 17, 31, 33, 64, 100])

OPS = ReferenceOps()


def random_values(rows, cols, seed):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * rng.choice([1e-4, 1, 15], (rows, 1))).astype(np.float32)


def tensors(*values):
    return [torch.from_numpy(v) for v in values]


@BY_ISA
@WIDTHS
@pytest.mark.parametrize("name", ["add", "silu_mul", "sigmoid_mul"])
def test_two_inputs(isa, cols, name):
    a, b = random_values(65, cols, 0), random_values(65, cols, 1)
    (y,) = run_op(lambda ops, a, b: [getattr(ops, name)(a, b)], a, b, isa=isa)
    expected = getattr(OPS, name)(*tensors(a, b)).numpy()
    if name == "add":
        assert_same_bits(y, expected)
    assert_close(y, expected)


@BY_ISA
@WIDTHS
def test_a_gate_for_the_whole_row(isa, cols):
    x, gate = random_values(65, cols, 0), random_values(65, 1, 1)
    (y,) = run_op(lambda ops, x, gate: [ops.sigmoid_mul(x, gate)], x, gate, isa=isa)
    assert_close(y, OPS.sigmoid_mul(*tensors(x, gate)).numpy())


def test_gates_of_another_width_are_refused():
    with pytest.raises(ValueError, match="sigmoid_mul"):
        run_op(lambda ops, x, gate: [ops.sigmoid_mul(x, gate)], np.ones((1, 4)), np.ones((1, 2)))


@BY_ISA
def test_silu_mul_of_extreme_gates(isa):
    gate = np.array([[-1e4, -200, -100, -88, -50, 0, 50, 88, 100, 1e30]], np.float32).T
    (y,) = run_op(lambda ops, a, b: [ops.silu_mul(a, b)], gate, np.ones_like(gate), isa=isa)
    expected = OPS.silu_mul(*tensors(gate.astype(np.float64), np.ones_like(gate))).numpy()
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-33)


@BY_ISA
@WIDTHS
@pytest.mark.parametrize("num_runs", [1, 3])
def test_rms_norm(isa, cols, num_runs):
    """The whole row, and each of several runs, as of heads."""
    x = random_values(65, cols * num_runs, 2)
    x[7] = 0
    weight = 1 + random_values(1, cols, 3)[0]
    (y,) = run_op(lambda ops, x: [ops.rms_norm(x, parameter(weight), 1e-5)], x, isa=isa)
    assert_close(y, OPS.rms_norm(torch.from_numpy(x), parameter(torch.from_numpy(weight)), 1e-5).numpy())


@BY_ISA
def test_rms_norm_reads_its_eps(isa):
    x, weight = np.full((1, 32), 1e-3, np.float32), np.ones(32, np.float32)
    for eps in (1e-6, 1e-5, 1.0):
        (y,) = run_op(lambda ops, x, eps=eps: [ops.rms_norm(x, parameter(weight), eps)], x, isa=isa)
        np.testing.assert_allclose(y, 1e-3 / np.sqrt(1e-6 + eps), rtol=1e-5)


@BY_ISA
@pytest.mark.parametrize("first_col", [0, 16, 5])
def test_strided_inputs(isa, first_col):
    x, weight = random_values(9, 90, 4), random_values(1, 40, 5)[0]
    view = np.ascontiguousarray(x[:, first_col : first_col + 40])
    other = np.ascontiguousarray(x[:, 50:90])

    def build(name):
        return lambda ops, x: [getattr(ops, name)(columns(x, first_col, 40), columns(x, 50, 40))]

    for name in ("add", "silu_mul", "sigmoid_mul"):
        (y,) = run_op(build(name), x, isa=isa)
        assert_close(y, getattr(OPS, name)(*tensors(view, other)).numpy())
    (y,) = run_op(lambda ops, x: [ops.rms_norm(columns(x, first_col, 40), parameter(weight), 1e-5)], x)
    assert_close(y, OPS.rms_norm(torch.from_numpy(view), parameter(torch.from_numpy(weight)), 1e-5).numpy())


@BY_ISA
@pytest.mark.parametrize("name", ["add", "silu_mul", "sigmoid_mul", "rms_norm"])
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, name):
    x = random_values(65, 50, 6)
    weight = random_values(1, 50, 7)[0]

    def build(ops, x):
        if name == "rms_norm":
            return [ops.rms_norm(x, parameter(weight), 1e-5)]
        return [getattr(ops, name)(x, x)]

    program = OpProgram(build, x, isa=isa)
    (whole,) = program.run_rows(range(65))
    for count in range(1, 66):
        rows = np.random.default_rng(count).permutation(65)[:count]
        assert_same_bits(program.run_rows(rows)[0], whole[rows])
    (y,) = run_op(build, x, isa=isa, num_threads=2)
    assert_same_bits(y, whole)


@BY_ISA
def test_select_rows(isa):
    x = random_values(10, 20, 8)
    program = OpProgram(lambda ops, x: [ops.select_rows(x, None)], x, isa=isa)
    (y,) = program.run_rows([3, 9, 0])
    assert_same_bits(y, x[[3, 9, 0]])
