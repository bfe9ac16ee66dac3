"""A batch that does not fit is refused before any kernel reads it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jinn import _native
from jinn.ops.native import Instruction, Recording, SymbolicValue, batch_arrays, compile_program
from jinn.ops.protocol import Context

from .programs import OpProgram, one_sequence, pack, parameter

GOOD = one_sequence([0, 1, 2], 20)


def ints(*values):
    return np.array(values, np.int32)


@pytest.fixture(scope="module")
def program():
    return OpProgram(lambda ops, x: [ops.add(x, x)], np.ones((4, 8), np.float32))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"token_ids": ints(0, 1, 4)}, "token id outside"),
        ({"token_ids": ints(0, -1, 2)}, "token id outside"),
        ({"token_ids": ints()}, "empty"),
        ({"positions": ints(17, 18)}, "a position per token"),
        ({"positions": ints(16, 17, 18)}, "not consecutive"),
        ({"positions": ints(17, 19, 19)}, "not consecutive"),
        ({"query_start": ints(0, 2)}, "does not cover"),
        ({"query_start": ints(1, 3)}, "does not cover"),
        ({"query_start": ints(0, 1, 3)}, "num_seqs"),
        ({"context_lens": ints(2)}, "empty sequence"),
        ({"block_tables": ints(0).reshape(1, 1)}, "shorter than the context"),
        ({"block_tables": ints(0, 2).reshape(1, 2)}, "no such block"),
        ({"block_tables": ints(0, -1).reshape(1, 2)}, "no such block"),
        ({"block_tables": ints(0, 1, 0, 1).reshape(2, 2)}, "block table per sequence"),
        ({"logit_rows": ints(3)}, "logit row"),
        ({"logit_rows": ints(-1)}, "logit row"),
        (
            {
                "query_start": ints(0, 3, 3),
                "context_lens": ints(20, 1),
                "block_tables": ints(0, 1, 0, 1).reshape(2, 2),
            },
            "empty sequence",
        ),
    ],
)  # fmt: skip
def test_a_batch_that_lies_is_refused(program, change, error):
    blocks = _native.KVCache([(1, 4, 4)], "f32", 2, 16)
    (y,) = program.run(GOOD, blocks)
    assert (y == 2).all()
    with pytest.raises(ValueError, match=error):
        program.run(replace(GOOD, **change), blocks)


def test_no_rows_wanted_gives_no_logits(program):
    (y,) = program.run(replace(GOOD, logit_rows=ints()))
    assert y.shape == (0, 8)


def test_wrong_widths_are_refused_by_the_op():
    weight = pack(np.ones((16, 32)), "Q8_0")

    def compiled(ops_of):
        return OpProgram(lambda ops, x: ops_of(ops, x), np.ones((2, 32), np.float32))

    with pytest.raises(ValueError, match=r"\[add\] expected equal widths"):
        compiled(lambda ops, x: [ops.add(x, SymbolicValue(x.buffer, 16))])
    with pytest.raises(ValueError, match=r"\[rms_norm\] expected columns in whole runs"):
        compiled(lambda ops, x: [ops.rms_norm(x, parameter(np.ones(12, np.float32)), 1e-5)])
    with pytest.raises(ValueError, match=r"\[linear\] expected a bias per weight row"):
        compiled(lambda ops, x: ops.linear(x, [parameter(weight, np.ones(15, np.float32))], Context()))
    with pytest.raises(ValueError, match=r"\[quantize\] expected columns in groups of 32"):
        compiled(lambda ops, x: ops.linear(SymbolicValue(x.buffer, 16), [parameter(weight)], Context()))


def test_a_weight_wider_than_its_input_is_refused():
    weight = pack(np.ones((16, 64)), "Q8_0")
    with pytest.raises(ValueError, match=r"\[linear\]"):
        OpProgram(lambda ops, x: ops.linear(x, [parameter(weight)], Context()), np.ones((2, 32), np.float32))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(
        ValueError, match=r"JINN_ISA=sse9 is not available on this machine; it has .*portable"
    ):
        _native.choose_kernels("sse9")


def test_profile_names_every_instruction():
    table = pack(np.ones((4, 16)))
    value = OpProgram(lambda ops, x: [x], np.ones((4, 16), np.float32))._outputs[0]
    embed = Instruction("embed", (), (value,), {"table": table})
    add = Instruction("add", (value, value), (value,))
    pool = _native.ThreadPool(2)
    program = compile_program(Recording([embed, add], value), pool, _native.choose_kernels(""))
    blocks = _native.KVCache([(1, 4, 4)], "f32", 2, 16)
    times = _native.profile(program, blocks, None, 4, batch_arrays(GOOD))
    assert " + ".join(name for name, _ in times) == "embed + add"  # a stage is timed as one
    assert all(seconds >= 0 for _, seconds in times)
