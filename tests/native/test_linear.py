"""Linear kernels of every format, activation type and instruction set, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jinn import _native
from jinn.ops.protocol import Context
from jinn.ops.reference import ReferenceOps
from jinn.weights.block_formats import FORMAT_BY_NAME

from .compare import assert_close, assert_same_bits
from .programs import (
    FORMATS,
    INTEGER_FORMATS,
    ISAS,
    POOLS,
    OpProgram,
    columns,
    pack,
    parameter,
    random_blocks,
    run_op,
    whole_blocks,
)

ACTIVATIONS = ("int12", "mixed", "int8", "bf16", "f32")
BY_ISA = pytest.mark.parametrize("isa", ISAS)
BY_FORMAT = pytest.mark.parametrize("name", FORMATS)
BY_ACTIVATIONS = pytest.mark.parametrize("activations", ACTIVATIONS)


def random_values(rows, cols, seed=0):
    """Rows of very different sizes, one of them half zero, with outliers in half of their groups."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, cols)) * rng.choice([1e-3, 1, 100], (rows, 1))
    values[rng.random(values.shape) < 1 / 48] *= 30
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
    return lambda ops, x: ops.linear(x, nodes, Context())


@BY_ISA
@BY_FORMAT
@BY_ACTIVATIONS
@pytest.mark.parametrize(("rows", "cols"), [(15, 64), (16, 96), (17, 32), (50, 160), (33, 576)])
def test_values(isa, name, activations, rows, cols):
    cols = whole_blocks(name, cols)
    node = parameter(pack(weight_values(rows, cols), name), weight_values(1, rows, seed=2)[0])
    x = random_values(65, cols)
    (y,) = run_op(linear(node), x, isa=isa, activations=activations)
    assert_close(y, expected_linear(x, node, activations))


@BY_ISA
@BY_FORMAT
@BY_ACTIVATIONS
def test_a_single_output(isa, name, activations):
    """Of positive terms, since there is no other output to measure an error by."""
    cols = whole_blocks(name, 64)
    node = parameter(pack(np.abs(weight_values(1, cols)), name))
    signs = np.where(node.weight.dequantize()[0] < 0, -1, 1).astype(np.float32)
    x = np.abs(random_values(65, cols)) * signs
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
def test_every_half_precision_number(isa):
    """Subnormal ones, infinities and NaNs too."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    node = parameter(_native.pack(POOLS[1], np.repeat(halves, 4).view(np.uint8), "F16", 1 << 16, 4))
    (y,) = run_op(linear(node), np.ones((1, 4), np.float32), isa=isa, activations="f32")
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(y[0], 4 * halves.astype(np.float32))


@BY_ISA
@BY_FORMAT
@BY_ACTIVATIONS
def test_a_row_does_not_depend_on_the_rows_beside_it(isa, name, activations):
    """Every row count from 1 to 65, rows at other places in the batch, and two threads: the same bits."""
    cols = whole_blocks(name, 96)
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
    cols = 256
    nodes = [
        parameter(pack(weight_values(rows, cols, seed=rows), name), bias)
        for rows, name, bias in [
            (17, "Q4_1", None),
            (48, "F16", weight_values(1, 48)[0]),
            (5, "Q8_0", weight_values(1, 5)[0]),
            (16, "BF16", None),
            (33, "Q4_0", None),
            (20, "Q4_K", None),
            (18, "Q6_K", weight_values(1, 18)[0]),
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
        lambda ops, x: ops.linear(columns(x, first_col, 64), [node], Context()),
        x,
        isa=isa,
        activations=activations,
    )
    view = np.ascontiguousarray(x[:, first_col : first_col + 64])
    assert_close(y, expected_linear(view, node, activations))


@BY_ISA
@BY_FORMAT
@BY_ACTIVATIONS
def test_a_residual_is_added_as_by_an_add(isa, name, activations):
    """`fuse` lets a linear add: the same bits as two instructions."""
    cols = whole_blocks(name, 64)
    node = parameter(pack(weight_values(40, cols), name), weight_values(1, 40)[0])
    x, residual = random_values(7, cols), random_values(7, 40, seed=5)

    def build(ops, x, residual):
        (y,) = ops.linear(x, [node], Context())
        return [ops.add(residual, y)]

    settings = {"isa": isa, "activations": activations}
    (apart,) = run_op(build, x, residual, **settings)
    (fused,) = run_op(build, x, residual, is_fused=True, **settings)
    assert_same_bits(fused, apart)


@pytest.mark.parametrize("name", INTEGER_FORMATS)
@pytest.mark.parametrize("activations", ["int12", "mixed", "int8"])
def test_amx_and_avx512_give_the_same_bits(name, activations):
    if not {"amx", "avx512"} <= set(ISAS):
        pytest.skip("this machine has no AMX")
    node = parameter(pack(weight_values(40, 512), name))
    x = random_values(65, 512)
    amx, avx512 = (run_op(linear(node), x, isa=isa, activations=activations)[0] for isa in ("amx", "avx512"))
    assert_same_bits(amx, avx512)


@pytest.mark.parametrize("cols", [576, 33])
def test_amx_and_avx512_give_the_same_bits_of_bf16(cols):
    """Numbers of all sizes, so that some products and sums are below the smallest normal number."""
    if not {"amx", "avx512"} <= set(ISAS):
        pytest.skip("this machine has no AMX")
    rng = np.random.default_rng(7)
    scales = np.exp2(rng.integers(-75, 0, (65, cols)))
    node = parameter(pack((weight_values(40, cols) * scales[:40]).astype(np.float32), "BF16"))
    x = (random_values(65, cols) * scales).astype(np.float32)
    for count in (1, 3, 16, 40, 65):
        amx, avx512 = (run_op(linear(node), x[:count], isa=isa)[0] for isa in ("amx", "avx512"))
        assert_same_bits(amx, avx512)


@BY_ISA
@pytest.mark.parametrize("activations", ["int12", "mixed", "int8"])
def test_tiny_numbers_depend_on_nothing_beside_them(isa, activations):
    """Whose squares are subnormal or zero, so that equal ones may seem to outweigh each other."""
    node = parameter(pack(weight_values(16, 96), "Q8_0"))
    rng = np.random.default_rng(3)
    x = np.zeros((64, 96), np.float32)
    for row, size in zip(x, np.exp2(rng.uniform(-80, -60, 64)), strict=True):
        row[32 + rng.choice(32, rng.integers(2, 33), replace=False)] = size
    (y,) = run_op(linear(node), x, isa=isa, activations=activations)
    assert_close(y, expected_linear(x, node, activations))
    x[:, 64:] = 5
    (beside,) = run_op(linear(node), x, isa=isa, activations=activations)
    x[:, 32:64] = 0
    (alone,) = run_op(linear(node), x, isa=isa, activations=activations)
    assert_close(beside, alone)


@BY_ISA
@pytest.mark.parametrize("name", INTEGER_FORMATS)
@pytest.mark.parametrize("activations", ["int12", "mixed", "int8"])
def test_the_largest_codes_do_not_saturate(isa, name, activations):
    """Each row repeats one byte, so that codes and sub-scales are at the ends of what they can be."""
    block_format = FORMAT_BY_NAME[name]
    rows, cols = 16, 4096
    blocks = random_blocks(name, (rows, cols), 1.0).reshape(rows, -1, block_format.block_bytes)
    row_bytes = [
        0x00,
        0x01,
        0x0F,
        0x10,
        0x1F,
        0x20,
        0x2F,
        0x3F,
        0x40,
        0x55,
        0x7F,
        0x80,
        0x88,
        0xAA,
        0xF0,
        0xFF,
    ]
    is_scale = np.zeros(block_format.block_bytes, bool)
    for offset in block_format.scale_offsets:
        is_scale[offset : offset + 2] = True
    blocks[:, :, ~is_scale] = np.array(row_bytes, np.uint8)[:, None, None]
    node = parameter(_native.pack(POOLS[1], blocks.reshape(-1), name, rows, cols))
    weights = node.weight.dequantize()
    x = np.concatenate([np.where(weights < 0, -1, 1), np.where(weights < 0, 1, -1), np.ones((1, cols))])
    x = x.astype(np.float32)
    (y,) = run_op(linear(node), x, isa=isa, activations=activations)
    terms = np.abs(x) @ np.abs(weights).T
    assert (np.abs(y - expected_linear(x, node, activations)) <= 1e-5 * terms).all()


@BY_ISA
def test_activations_are_shared_by_their_readers(isa):
    """Two linears of one input quantize it once, and an input of zeros gives the bias."""
    first, second = (parameter(pack(weight_values(16, 64, seed), "Q8_0")) for seed in (1, 2))
    second.bias = weight_values(1, 16)[0]

    def build(ops, x):
        ops.linear(x, [first], Context())
        (y,) = ops.linear(x, [second], Context())
        assert [ins.name for ins in ops.instructions].count("quantize") == 1
        return [y]

    (y,) = run_op(build, np.zeros((3, 64), np.float32), isa=isa)
    assert_same_bits(y, np.repeat(second.bias[None], 3, axis=0))
