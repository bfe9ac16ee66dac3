"""Gate, up, their product and its quantization as one instruction: the bits of one after another."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from jinn import _native
from jinn.ops.protocol import Context

from .compare import assert_same_bits
from .programs import ISAS, POOLS, OpProgram, one_sequence, pack, parameter, whole_blocks

NUM_ROWS = 130


def mlp(format_name, inner, has_bias=False, down_format="Q8_0"):
    """Gate, up and down for inputs of 64 columns or the format's next width."""
    rng = np.random.default_rng(inner)
    cols = whole_blocks(format_name, 64)

    def linear(rows, cols, name):
        bias = rng.standard_normal(rows).astype(np.float32) if has_bias else None
        return parameter(pack(rng.standard_normal((rows, cols)).astype(np.float32) / 8, name), bias)

    return SimpleNamespace(
        cols=cols,
        gate=linear(inner, cols, format_name),
        up=linear(inner, cols, format_name),
        down=linear(64, inner, down_format),
    )


def program(nodes, is_fused, **settings):
    x = np.random.default_rng(0).standard_normal((NUM_ROWS, nodes.cols)).astype(np.float32)

    def build(ops, x):
        hidden = ops.silu_mul(*ops.linear(x, [nodes.gate, nodes.up], Context()))
        return ops.linear(hidden, [nodes.down], Context())

    return OpProgram(build, x, is_fused=is_fused, **settings)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activations", ["int8", "mixed", "int12"])
@pytest.mark.parametrize("format_name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_bits_are_those_of_single_steps(isa, activations, format_name):
    nodes = mlp(format_name, 320)
    settings = {"isa": isa, "activations": activations}
    plain, fused = program(nodes, False, **settings), program(nodes, True, num_threads=2, **settings)
    for num_rows in (1, 2, 7, 16, 65, NUM_ROWS):
        assert_same_bits(fused.run_rows(range(num_rows))[0], plain.run_rows(range(num_rows))[0])


@pytest.mark.parametrize("inner", [32, 96, 9216])
@pytest.mark.parametrize("num_rows", [1, 64])
def test_widths(inner, num_rows):
    """Less than is computed at once, not a multiple of it, and many times it."""
    nodes = mlp("Q4_0", inner)
    plain, fused = (
        program(nodes, is_fused, activations="int12").run_rows(range(num_rows)) for is_fused in (False, True)
    )
    assert_same_bits(fused[0], plain[0])


def test_biases():
    nodes = mlp("Q8_0", 96, has_bias=True)
    batch = one_sequence(range(20))
    assert_same_bits(program(nodes, True).run(batch)[0], program(nodes, False).run(batch)[0])


@pytest.mark.parametrize("down_format", ["BF16", "F32"])
def test_a_down_of_floats(down_format):
    nodes = mlp("Q8_0", 40, down_format=down_format)
    batch = one_sequence(range(20))
    assert_same_bits(program(nodes, True).run(batch)[0], program(nodes, False).run(batch)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": 1}, "gate and up"),
        ({"shapes": (64, 32)}, "one shape"),
        ({"bias": np.ones(3, np.float32)}, "a bias per weight row"),
        ({"out_type": "f32"}, "as wide as the weights"),
        ({"shapes": (40, 40)}, "groups of 32"),
    ],
)
def test_bad_arguments(change, message):
    shapes = change.get("shapes", (32, 32))
    weights = [pack(np.ones((rows, 32)), "Q8_0") for rows in shapes][: change.get("weights", 2)]
    native = _native.Program(POOLS[1], _native.choose_kernels(""))
    native.begin_stage()
    row_bytes = _native.activation_stride("int8", 32)
    x, out = native.add_buffer(False, row_bytes, 0), native.add_buffer(False, row_bytes, 1)
    biases = [change.get("bias", np.empty(0, np.float32))] * len(weights)
    with pytest.raises(ValueError, match=message):
        native.gated_linear(x, "int8", weights, biases, out, change.get("out_type", "int8"), False)
