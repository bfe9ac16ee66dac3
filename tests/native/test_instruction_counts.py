"""Kernels by the instructions they take, in one thread: as many on a busy machine as on a quiet one.

An entry that a change makes too low or too high is replaced by the new count, together with what explains it.
"""

from __future__ import annotations

from functools import partial
from time import monotonic
from types import SimpleNamespace

import numpy as np
import pytest

from jinn import _native
from jinn.engine.messages import SamplingParams
from jinn.engine.runner import sample_request
from jinn.engine.sampler import SampleRow
from jinn.ops.protocol import Context, KVSpec, RouteSpec

from .instruction_counts import IS_SUPPORTED, compiler, count_instructions
from .programs import ISAS, OpProgram, one_sequence, pack, pack_experts, parameter

pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="instructions are counted on Linux and x86-64 only")

COMPILER = "GCC 12"
"""What compiled the kernels that the tables are of."""

LINEAR = {
    ("amx", "Q4_0"): {1: 98, 2: 240, 8: 349, 16: 386, 32: 468},
    ("amx", "Q8_0"): {1: 103, 2: 239, 8: 340, 16: 398},
    ("amx", "Q4_K"): {1: 122, 2: 270, 8: 407, 16: 463},
    ("amx", "Q6_K"): {1: 158, 2: 333, 8: 640, 16: 593},
    ("amx", "BF16"): {1: 150, 2: 351, 8: 178, 16: 218, 32: 205},
    ("avx512", "Q4_0"): {1: 121, 2: 240, 8: 520},
    ("avx512", "Q8_0"): {1: 120, 2: 239, 8: 518},
    ("avx512", "Q4_K"): {1: 146, 2: 270, 8: 535},
    ("avx512", "Q6_K"): {1: 190, 2: 333, 8: 676},
    ("avx512", "BF16"): {1: 150, 2: 351, 8: 850},
    ("avx_vnni", "Q4_0"): {1: 189, 2: 404, 8: 928},
    ("avx_vnni", "Q8_0"): {1: 179, 2: 381, 8: 883},
    ("avx_vnni", "Q4_K"): {1: 257, 2: 511, 8: 1196},
    ("avx_vnni", "Q6_K"): {1: 317, 2: 610, 8: 1496},
    ("avx_vnni", "BF16"): {1: 355, 2: 724, 8: 2372},
    ("avx2", "Q4_0"): {1: 237, 2: 485, 8: 1531},
    ("avx2", "Q8_0"): {1: 412, 2: 827, 8: 2780},
    ("avx2", "Q4_K"): {1: 295, 2: 543, 8: 1622},
    ("avx2", "Q6_K"): {1: 360, 2: 644, 8: 1963},
    ("avx2", "BF16"): {1: 355, 2: 724, 8: 2372},
    ("portable", "Q4_0"): {1: 2454, 2: 4176},
    ("portable", "Q8_0"): {1: 2374},
    ("portable", "Q4_K"): {1: 2663},
    ("portable", "Q6_K"): {1: 2691},
    ("portable", "BF16"): {1: 959, 2: 1767},
}
"""Per 16 outputs and 32 columns, for so many rows; inputs of integer weights in 12 bits."""

MIXED_LINEAR = {
    ("avx512", "Q4_0"): {1: 98, 2: 268, 8: 449},
    ("avx512", "Q8_0"): {1: 101, 2: 271, 8: 446},
    ("avx512", "Q4_K"): {1: 124, 2: 293, 8: 451},
    ("avx512", "Q6_K"): {1: 169, 2: 354, 8: 596},
    ("avx_vnni", "Q4_0"): {1: 142, 2: 362, 8: 762},
    ("avx_vnni", "Q8_0"): {1: 133, 2: 360, 8: 739},
    ("avx_vnni", "Q4_K"): {1: 191, 2: 426, 8: 856},
    ("avx_vnni", "Q6_K"): {1: 362, 2: 605, 8: 1381},
    ("avx2", "Q4_0"): {1: 164, 2: 412, 8: 1048},
    ("avx2", "Q8_0"): {1: 262, 2: 590, 8: 1682},
    ("avx2", "Q4_K"): {1: 215, 2: 459, 8: 1133},
    ("avx2", "Q6_K"): {1: 375, 2: 654, 8: 1545},
    ("portable", "Q4_0"): {1: 1606},
    ("portable", "Q8_0"): {1: 1572},
    ("portable", "Q4_K"): {1: 1874},
    ("portable", "Q6_K"): {1: 1975},
}
"""The same of inputs in 8 bits with few outliers, whose listing a tile has to itself with 2 and 8 rows."""

EXPERTS = {
    ("amx", "Q4_0"): {1: 270, 2: 327},
    ("avx512", "Q4_0"): {1: 284, 2: 325},
    ("avx_vnni", "Q4_0"): {1: 383, 2: 525},
    ("avx2", "Q4_0"): {1: 431, 2: 607},
    ("portable", "Q4_0"): {1: 2451},
}
"""The same, of gate and up projections of one expert."""

ATTENTION = {
    ("amx", "bf16"): {1: 43, 32: 37},
    ("avx512", "bf16"): {1: 64, 32: 59},
    ("avx_vnni", "bf16"): {1: 97, 16: 226},
    ("avx2", "bf16"): {1: 97, 16: 226},
    ("portable", "bf16"): {1: 235, 16: 500},
}
"""Per query and key of a head of 64 columns, by the prompt's length; 1: a token after 127 others."""

SAMPLING = {"avx512": 24.3, "avx2": 27.4}
"""Per logit of 1,024, of which the 20 largest may be drawn."""


def entries(table):
    """(instruction set, type, rows, count) of what this machine can run."""
    return [
        (*key, rows, count)
        for key, counts in table.items()
        for rows, count in counts.items()
        if key[0] in ISAS
    ]


def check(count, entry):
    assert count <= 1.1 * entry, f"{count:.1f} instructions: more than 10% above the entry, {entry}"
    if compiler() == COMPILER:
        assert count >= 0.75 * entry, f"{count:.1f} instructions: lower the entry, {entry}"


def random_values(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def count_stage(name, program, batch, cache=None):
    """Instructions of the only stage whose name starts so."""
    profile = partial(_native.profile, *program.arguments(batch, cache))
    (index,) = (i for i, (stage, _) in enumerate(profile()) if stage.startswith(name))
    return count_instructions(profile, index + 1)


def num_outputs(isa, rows):
    """Few, but enough that the kernel takes more than what a stage takes beside it."""
    if rows == 1 and isa != "portable":
        return 512  # so that a claim has four tiles, which AMX's kernels read at once for one row
    if rows == 32:
        return 256  # so that a claim has several tiles, which AMX multiplies in pairs
    return 32 if isa in ("amx", "avx512") else 16


def count_linear(isa, format_name, rows, cols=256, activations="int12"):
    outputs = num_outputs(isa, rows)
    node = parameter(pack(random_values(outputs, cols), format_name))
    program = OpProgram(
        lambda ops, x: ops.linear(x, [node], Context()),
        random_values(rows, cols),
        isa=isa,
        activations=activations,
        is_poisoned=False,
    )
    return count_stage("linear", program, one_sequence(range(rows))) / (outputs / 16 * cols / 32)


def count_experts(isa, format_name, rows, inner=32, cols=128):
    shapes = {"gate_proj": (inner, cols), "up_proj": (inner, cols), "down_proj": (cols, inner)}
    node = SimpleNamespace(
        **{
            part: parameter(pack_experts(random_values(1, *shape), format_name))
            for part, shape in shapes.items()
        }
    )
    router = parameter(pack(random_values(1, cols)))
    program = OpProgram(
        lambda ops, x: [ops.experts(x, ops.route(x, router, RouteSpec(1)), node)],
        random_values(rows, cols),
        isa=isa,
        activations="int12",
        is_poisoned=False,
    )
    count = count_stage("experts_gated_linear", program, one_sequence(range(rows)))
    return count / (2 * inner / 16 * cols / 32)


def count_attention(isa, cache_type, num_tokens, width=64):
    program = OpProgram(
        lambda ops, q, k, v: [ops.attention(q, k, v, Context(), KVSpec(1, width, width), width**-0.5)],
        *random_values(3, num_tokens, width),
        isa=isa,
        is_poisoned=False,
    )
    batch = one_sequence(range(num_tokens), 128 if num_tokens == 1 else num_tokens)
    cache = _native.KVCache([(1, width, width)], cache_type, batch.block_tables.size, 16)
    for block in range(batch.block_tables.size):
        cache.fill_block(block, 0)
    return count_stage("attention", program, batch, cache) / int((batch.positions + 1).sum())


def count_sampling(isa, vocab_size=1024):
    kernels, logits, no_ids = _native.choose_kernels(isa), random_values(vocab_size), np.empty(0, np.int32)
    request = sample_request(SampleRow(SamplingParams(temperature=1.0, top_k=20), 0, 0, no_ids, no_ids))

    def run():
        monotonic()
        _native.sample_row(kernels, logits, request)
        monotonic()

    run()
    return count_instructions(run, 1) / vocab_size


@pytest.fixture(scope="module", autouse=True)
def _tracing():
    try:
        count_instructions(lambda: (monotonic(), monotonic()), 1)
    except OSError as error:
        pytest.skip(f"a process may not trace its child here: {error}")


@pytest.mark.parametrize(("isa", "format_name", "rows", "entry"), entries(LINEAR))
def test_linear(isa, format_name, rows, entry):
    check(count_linear(isa, format_name, rows), entry)


@pytest.mark.parametrize(("isa", "format_name", "rows", "entry"), entries(MIXED_LINEAR))
def test_mixed_linear(isa, format_name, rows, entry):
    check(count_linear(isa, format_name, rows, activations="mixed"), entry)


@pytest.mark.parametrize(("isa", "format_name", "rows", "entry"), entries(EXPERTS))
def test_experts(isa, format_name, rows, entry):
    check(count_experts(isa, format_name, rows), entry)


@pytest.mark.parametrize(("isa", "cache_type", "num_tokens", "entry"), entries(ATTENTION))
def test_attention(isa, cache_type, num_tokens, entry):
    check(count_attention(isa, cache_type, num_tokens), entry)


@pytest.mark.parametrize("isa", [isa for isa in SAMPLING if isa in ISAS])
def test_sampling(isa):
    check(count_sampling(isa), SAMPLING[isa])


@pytest.mark.parametrize("isa", ISAS)
def test_a_count_is_the_same_twice(isa):
    """Of weights that lie elsewhere."""
    assert count_linear(isa, "Q4_0", 1) == count_linear(isa, "Q4_0", 1)


def test_a_slower_kernel_is_seen():
    with pytest.raises(AssertionError, match="above the entry"):
        check(count_linear("portable", "Q4_0", 1), LINEAR["avx2", "Q4_0"][1])


def test_an_entry_that_is_too_high_is_seen(monkeypatch):
    monkeypatch.setattr(f"{__name__}.compiler", lambda: COMPILER)
    with pytest.raises(AssertionError, match="lower the entry"):
        check(74, 100)
    monkeypatch.setattr(f"{__name__}.compiler", lambda: "GCC 14")
    check(74, 100)
