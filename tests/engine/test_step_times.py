from __future__ import annotations

import pytest

from jinn.engine.step_times import StepTimes


def settle(times, cost, limit, num_steps=30):
    """Read as many tokens as are advised, step after step; the last step's."""
    for _ in range(num_steps):
        num_tokens = times.most_tokens(limit)
        times.note(num_tokens, cost(num_tokens))
    return num_tokens


def test_the_first_step_is_small():
    assert StepTimes().most_tokens(1e6) == 16


@pytest.mark.parametrize(
    ("fixed", "per_token", "expected"), [(0, 0.5, 600), (45, 2.5, 102), (290, 1, 10), (0, 40, 7)]
)
def test_steps_grow_until_they_fill_the_time(fixed, per_token, expected):
    longest = 0.0

    def cost(num_tokens):
        nonlocal longest
        longest = max(longest, fixed + per_token * num_tokens)
        return fixed + per_token * num_tokens

    assert settle(StepTimes(), cost, 300) == pytest.approx(expected, rel=0.2, abs=1)
    assert longest <= max(300, cost(16)) * 1.01


def test_many_tokens_at_once_say_little_of_few():
    times = StepTimes()
    times.note(2048, 20_000)
    assert times.most_tokens(300) == 16
    assert settle(times, lambda n: 100 + 9 * n, 300) == pytest.approx(22, abs=2)


def test_a_pause_of_the_machine_is_forgotten():
    times = StepTimes()
    expected = settle(times, lambda n: 10 + n, 300)
    times.note(expected, 20_000)
    times.note(16, 20_000)
    assert settle(times, lambda n: 10 + n, 300) == pytest.approx(expected, rel=0.1)


def test_a_step_has_a_token():
    times = StepTimes()
    assert settle(times, lambda n: 1e4 * n, 300) == 1
