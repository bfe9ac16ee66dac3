from __future__ import annotations

import pytest

from jinn.engine.step_size import StepSize


def settle(size, cost, num_steps=30):
    """Read as many tokens as are advised, step after step; the last step's."""
    for _ in range(num_steps):
        num_tokens = size.tokens
        size.note(num_tokens, cost(num_tokens))
    return num_tokens


def test_the_first_step_is_small():
    assert StepSize(1e6, 512).tokens == 16


@pytest.mark.parametrize(
    ("fixed", "per_token", "expected"), [(0, 0.5, 600), (45, 2.5, 102), (290, 1, 10), (0, 40, 7)]
)
def test_steps_grow_until_they_fill_the_time(fixed, per_token, expected):
    longest = 0.0

    def cost(num_tokens):
        nonlocal longest
        longest = max(longest, fixed + per_token * num_tokens)
        return fixed + per_token * num_tokens

    assert settle(StepSize(300, 1000), cost) == pytest.approx(expected, rel=0.2, abs=1)
    assert longest <= max(300, cost(16)) * 1.01


def test_many_tokens_at_once_say_little_of_few():
    size = StepSize(300, 1000)
    size.note(2048, 20_000)
    assert size.tokens == 16
    assert settle(size, lambda n: 100 + 9 * n) == pytest.approx(22, abs=2)


def test_many_tokens_in_much_time_say_that_some_are_too_many():
    size = StepSize(300, 1000)
    settle(size, lambda n: 2 * n)
    size.note(512, 20_000)
    assert size.tokens == 75
    size.note(512, 20_000)
    assert size.tokens == 37


def test_steps_shrink_as_they_take_longer():
    """As those of a long prompt do, whose later tokens attend to more."""
    size = StepSize(250, 1000)
    longest = 0.0
    for num_read in range(0, 8000, 32):
        tokens = size.tokens
        ms = 60 + tokens * (5 + num_read / 1000)
        size.note(tokens, ms)
        longest = max(longest, ms)
    assert longest < 265
    assert tokens == pytest.approx(190 / 13, abs=2)


def test_a_pause_of_the_machine_takes_half_and_is_forgotten():
    size = StepSize(300, 1000)
    expected = settle(size, lambda n: 10 + n)
    size.note(expected, 20_000)
    assert size.tokens == pytest.approx(expected / 2, abs=1)
    assert settle(size, lambda n: 10 + n) == pytest.approx(expected, rel=0.1)


def test_a_step_has_a_token():
    size = StepSize(300, 1000)
    assert settle(size, lambda n: 1e4 * n) == 1
    assert settle(size, lambda n: n) > 200


@pytest.mark.parametrize("fixed", [130, 190, 225])
def test_a_step_of_one_token_is_not_the_last_size(fixed):
    """Though one more token may seem to need twice the time."""
    size = StepSize(250, 1000)
    assert settle(size, lambda n: 300 + n) == 1
    assert settle(size, lambda n: fixed + n, 200) == pytest.approx(250 - fixed, rel=0.2)


def test_a_step_has_no_more_than_can_be_read():
    size = StepSize(250, 512)
    assert settle(size, lambda n: n / 100) == 512
    size.note(512, 5000)
    assert size.tokens == 256
    assert StepSize(250, 8).tokens == 8
