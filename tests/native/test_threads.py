"""The thread pool: every worker takes part, and many runs in a row come to an end."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from jinn import _native
from jinn.ops.protocol import Context

from .compare import assert_same_bits
from .programs import OpProgram, one_sequence, pack, parameter


def test_a_pool_has_the_threads_it_was_asked_for():
    assert [_native.ThreadPool(n).num_threads for n in (1, 2, 5)] == [1, 2, 5]
    assert _native.default_num_threads() >= 1


@pytest.mark.parametrize("num_threads", [1, 2])
def test_thousands_of_small_runs(num_threads):
    """Each run has fewer items than threads at times; none may hang or lose an item."""
    x = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    first, second = parameter(pack(x, "Q8_0")), parameter(pack(x[:, :20]))

    def build(ops, x):
        return ops.linear(*ops.linear(x, [first], Context()), [second], Context())

    program = OpProgram(build, x, num_threads=num_threads)
    (expected,) = program.run_rows(range(20))
    for run in range(2000):
        rows = range(run % 20 + 1)
        (y,) = program.run_rows(rows)
        assert_same_bits(y, expected[: len(rows)])


def test_a_run_lets_other_threads_of_python_go_on():
    """The interpreter's lock is free while kernels run."""
    x = np.ones((512, 1024), np.float32)
    weight = parameter(pack(np.ones((1024, 1024), np.float32)))
    program = OpProgram(lambda ops, x: ops.linear(x, [weight], Context()), x)
    batch = one_sequence(range(512))
    num_ticks, is_done = 0, threading.Event()

    def tick():
        nonlocal num_ticks
        while not is_done.wait(1e-4):
            num_ticks += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    program.run(batch)
    is_done.set()
    ticker.join()
    assert num_ticks >= 3
