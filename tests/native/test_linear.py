"""Linear kernels of every format, activation type and instruction set, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jinn.ops.reference import ReferenceOps

from .compare import assert_close, assert_same_bits
from .programs import FORMATS, INTEGER_FORMATS, ISAS, OpProgram, columns, pack, parameter, run_op

ACTIVATIONS = ("int12", "int8", "bf16", "f32")
BY_ISA = pytest.mark.parametrize("isa", ISAS)
BY_FORMAT = pytest.mark.parametrize("name", FORMATS)
BY_ACTIVATIONS = pytest.mark.parametrize("activations", ACTIVATIONS)


def random_values(rows, cols, seed=0):
    """Rows of very different sizes, one of them zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, cols)) * rng.choice([1e-3, 1, 100], (rows, 1))
    values[rows // 2, : cols // 2] = 0
    return values.astype(np.float32)


def weight_values(rows, cols, seed=1):
    return (np.random.default_rng(seed).standard_normal((rows, cols)) / np.sqrt(cols)).astype(np.float32)


def reference_node(node):
    """The same node for ReferenceOps."""
    weight = torch.from_numpy(node.weight.dequantize())
    weight.format = node.weight.format
    return parameter(weight, torch.from_numpy(node.bias)) if hasattr(node, "bias") else parameter(weight)


def expected_linear(x, node, activations):
    """The reference's activations, multiplied in float64."""
    reference = reference_node(node)
    held = ReferenceOps(activations).held(torch.from_numpy(x), reference.weight.format)
    y = held.double() @ reference.weight.double().T
    return (y + reference.bias if hasattr(reference, "bias") else y).numpy()


def linear(*nodes):
    return lambda ops, x: ops.linear(x, nodes)


@BY_ISA
@BY_FORMAT
@BY_ACTIVATIONS
@pytest.mark.parametrize(("rows", "cols"), [(15, 64), (16, 96), (17, 32), (50, 160), (33, 576)])
def test_values(isa, name, activations, rows, cols):
    node = parameter(pack(weight_values(rows, cols), name), weight_values(1, rows, seed=2)[0])
    x = random_values(65, cols)
    (y,) = run_op(linear(node), x, isa=isa, activations=activations)
    assert_close(y, expected_linear(x, node, activations))


@BY_ISA
@BY_FORMAT
@BY_ACTIVATIONS
def test_a_single_output(isa, name, activations):
    """Of positive terms, since there is no other output to measure an error by."""
    node = parameter(pack(np.abs(weight_values(1, 64)), name))
    x = np.abs(random_values(65, 64))
    (y,) = run_op(linear(node), x, isa=isa, activations=activations)
    assert_close(y, expected_linear(x, node, activations))


@BY_ISA
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in INTEGER_FORMATS])
@BY_ACTIVATIONS
@pytest.mark.parametrize("cols", [1, 2, 3, 5, 31, 33, 63])
def test_input_widths_of_any_size(isa, name, activations, cols):
    node = parameter(pack(weight_values(20, cols), name))
    x = random_values(9, cols)
    (y,) = run_op(linear(node), x, isa=isa, activations=activations)
    assert_close(y, expected_linear(x, node, activations))


@BY_ISA
@BY_FORMAT
@BY_ACTIVATIONS
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, name, activations):
    """Every row count from 1 to 65, rows at other places in the batch, and two threads: the same bits."""
    cols = 96
    node = parameter(pack(weight_values(40, cols), name))
    x = random_values(65, cols)
    settings = {"isa": isa, "activations": activations}
    program = OpProgram(linear(node), x, **settings)
    (whole,) = program.run_rows(range(65))
    rng = np.random.default_rng(3)
    for count in range(1, 66):
        rows = rng.permutation(65)[:count]
        (y,) = program.run_rows(rows)
        assert_same_bits(y, whole[rows])
    (y,) = run_op(linear(node), x, num_threads=2, **settings)
    assert_same_bits(y, whole)


@BY_ISA
@BY_ACTIVATIONS
def test_one_call_reads_packs_of_several_formats(isa, activations):
    cols = 64
    nodes = [
        parameter(pack(weight_values(rows, cols, seed=rows), name), bias)
        for rows, name, bias in [
            (17, "Q4_1", None),
            (48, "F16", weight_values(1, 48)[0]),
            (5, "Q8_0", weight_values(1, 5)[0]),
            (16, "BF16", None),
            (33, "Q4_0", None),
        ]
    ]
    x = random_values(10, cols)
    outputs = run_op(linear(*nodes), x, isa=isa, activations=activations)
    for y, node in zip(outputs, nodes, strict=True):
        assert_close(y, expected_linear(x, node, activations))


@BY_ISA
@BY_ACTIVATIONS
@pytest.mark.parametrize("first_col", [0, 16, 7])
def test_strided_inputs(isa, activations, first_col):
    node = parameter(pack(weight_values(24, 64), "Q4_1"))
    x = random_values(6, 96)
    (y,) = run_op(
        lambda ops, x: ops.linear(columns(x, first_col, 64), [node]), x, isa=isa, activations=activations
    )
    view = np.ascontiguousarray(x[:, first_col : first_col + 64])
    assert_close(y, expected_linear(view, node, activations))


@BY_ISA
@BY_FORMAT
@BY_ACTIVATIONS
def test_a_residual_is_added_as_by_an_add(isa, name, activations):
    """`fuse` lets a linear add: the same bits as two instructions."""
    node = parameter(pack(weight_values(40, 64), name), weight_values(1, 40)[0])
    x, residual = random_values(7, 64), random_values(7, 40, seed=5)

    def build(ops, x, residual):
        (y,) = ops.linear(x, [node])
        return [ops.add(residual, y)]

    settings = {"isa": isa, "activations": activations}
    (apart,) = run_op(build, x, residual, **settings)
    (fused,) = run_op(build, x, residual, is_fused=True, **settings)
    assert_same_bits(fused, apart)


@BY_ISA
@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_the_largest_codes_do_not_saturate(isa, name):
    weights = np.where(np.arange(4096) % 2, 1, -1) * np.ones((16, 1))
    node = parameter(pack(weights.astype(np.float32), name))
    x = np.stack([weights[0], -weights[0], np.ones(4096)]).astype(np.float32)
    for activations in ("int12", "int8"):
        (y,) = run_op(linear(node), x, isa=isa, activations=activations)
        expected = expected_linear(x, node, activations)
        assert np.abs(y - expected).max() <= 1e-5 * 4096
        assert_close(y[:2], expected[:2])


@BY_ISA
def test_activations_are_shared_by_their_readers(isa):
    """Two linears of one input quantize it once, and an input of zeros gives the bias."""
    first, second = (parameter(pack(weight_values(16, 64, seed), "Q8_0")) for seed in (1, 2))
    second.bias = weight_values(1, 16)[0]

    def build(ops, x):
        ops.linear(x, [first])
        (y,) = ops.linear(x, [second])
        assert [ins.name for ins in ops.instructions].count("quantize") == 1
        return [y]

    (y,) = run_op(build, np.zeros((3, 64), np.float32), isa=isa)
    assert_same_bits(y, np.repeat(second.bias[None], 3, axis=0))
