"""Native sampling against engine/sampler.py, on random logits and settings."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jinn import _native
from jinn.engine import sampler
from jinn.engine.messages import SamplingParams
from jinn.engine.runner import sample_request
from jinn.engine.sampler import SampleRow

from .programs import ISAS

BY_ISA = pytest.mark.parametrize("isa", ISAS)
NO_IDS = np.empty(0, np.int32)
NEAR = 1e-5
"""How far from an edge float32 may decide otherwise, relative."""


def row_of(
    sampling=None,
    seed=0,
    position=0,
    seen_ids=NO_IDS,
    output_counts=NO_IDS,
    banned_ids=(),
    allowed=None,
    **settings,
):
    sampling = sampling or SamplingParams(**settings)
    bits = None if allowed is None else np.packbits(allowed, bitorder="little")
    words = None if bits is None else np.pad(bits, (0, -len(bits) % 4)).view(np.uint32)
    return SampleRow(
        sampling,
        seed,
        position,
        seen_ids,
        output_counts,
        tuple(banned_ids),
        allowed=None if words is None else lambda: words,
    )


def native(isa, logits, row):
    return _native.sample_row(_native.choose_kernels(isa), logits, sample_request(row))


def random_row(rng, vocab_size):
    """Any mix of settings, as a request might have them."""
    num_seen = int(rng.integers(0, min(30, vocab_size)))
    num_biased, num_banned = rng.integers(0, 4), rng.integers(0, min(3, vocab_size))
    sampling = SamplingParams(
        temperature=float(rng.choice([0.0, 0.05, 0.7, 1.0, 1.5, 5.0])),
        top_k=int(rng.choice([0, 1, 2, 20, 300, vocab_size])),
        top_p=float(rng.choice([1.0, 0.999, 0.95, 0.5, 1e-3])),
        min_p=float(rng.choice([0.0, 0.02, 0.3, 1.0])),
        repetition_penalty=float(rng.choice([1.0, 1.3, 0.8])),
        presence_penalty=float(rng.choice([0.0, 0.5, -1.0])),
        frequency_penalty=float(rng.choice([0.0, 0.25])),
        logit_bias={int(i): float(rng.uniform(-5, 5)) for i in rng.integers(0, vocab_size, num_biased)},
        logprobs=[None, 0, 1, 5, 20][rng.integers(5)],
    )  # fmt: skip
    seen_ids = rng.choice(vocab_size, num_seen, replace=False).astype(np.int32)
    counts = rng.integers(0, 4, num_seen).astype(np.int32)
    banned_ids = rng.choice(vocab_size, num_banned, replace=False).tolist()
    allowed = [None, None, rng.random(vocab_size) < 0.5, rng.random(vocab_size) < 0.01][rng.integers(4)]
    return row_of(
        sampling,
        int(rng.integers(0, 2**63)),
        int(rng.integers(0, 9999)),
        seen_ids,
        counts,
        banned_ids,
        allowed,
    )


def nearly_drawn(logits, row):
    """Every id that the definition draws with u or a filter's edge moved by NEAR."""
    values, sampling = sampler.adjusted(logits, row), row.sampling
    if sampling.temperature == 0.0:
        return set(np.flatnonzero(values >= values.max() - NEAR).tolist())
    u = sampler.uniform(row.seed, row.position)
    drawn = set()
    for du in (-NEAR, 0.0, NEAR):
        for factor in (1 - NEAR, 1.0, 1 + NEAR):
            edged = replace(
                sampling, top_p=min(sampling.top_p * factor, 1.0), min_p=min(sampling.min_p * factor, 1.0)
            )
            drawn.add(sampler.draw(values, edged, min(max(u + du, 0.0), 1 - 2**-53)))
    return drawn


def check_logprobs(sampled, expected, logits):
    assert sampled.logprob == pytest.approx(expected.logprob, abs=NEAR)
    assert sampled.top_ids == [token_id for token_id, _ in expected.top]
    assert sampled.top_logprobs == pytest.approx([value for _, value in expected.top], abs=NEAR)


@BY_ISA
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 263, 2000])
def test_random_settings(isa, vocab_size):
    """The same id; another only where the definition is within NEAR of drawing it. Those are counted."""
    rng = np.random.default_rng(vocab_size)
    outcomes = Counter()
    for _ in range(300):
        logits = (rng.standard_normal(vocab_size) * rng.choice([1e-3, 1, 4, 20])).astype(np.float32)
        row = random_row(rng, vocab_size)
        expected = sampler.sample(logits, row)
        sampled = native(isa, logits, row)
        if expected.error:
            assert sampled.token_id == -1
            continue
        is_same = sampled.token_id == expected.token_id
        assert is_same or sampled.token_id in nearly_drawn(logits, row), (row, sampled.token_id, expected)
        outcomes["same" if is_same else "near"] += 1
        if is_same and expected.logprobs:
            check_logprobs(sampled, expected.logprobs, logits)
    assert outcomes["near"] <= 3, outcomes


@BY_ISA
def test_ties_go_to_the_lower_id(isa):
    """Logits of few different values: every filter meets ties at its edge."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        logits = rng.integers(-3, 4, 100).astype(np.float32)
        top_k, logprobs = int(rng.integers(0, 40)), int(rng.integers(0, 21))
        for temperature in (0.0, 1.0):
            settings = {"temperature": temperature, "top_k": top_k, "logprobs": logprobs}
            row = row_of(seed=int(rng.integers(2**60)), **settings)
            expected, sampled = sampler.sample(logits, row), native(isa, logits, row)
            assert sampled.token_id == expected.token_id
            check_logprobs(sampled, expected.logprobs, logits)


@BY_ISA
def test_frequencies_follow_the_weights(isa):
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625], np.float32))
    draws = Counter(native(isa, logits, row_of(seed=seed)).token_id for seed in range(20_000))
    for token_id, weight in enumerate(np.exp(logits)):
        assert abs(draws[token_id] / 20_000 - weight) < 4 * math.sqrt(weight / 20_000)


@BY_ISA
@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-39, 1e-44, 1e-300])
def test_a_tiny_temperature_takes_the_largest(isa, temperature):
    logits = np.array([1, 3, 2, 3], np.float32)
    row = row_of(temperature=temperature, seed=1)
    assert native(isa, logits, row).token_id in (1, 3)
    logits[3] = 2.5
    assert native(isa, logits, row).token_id == 1
    assert sampler.sample(logits, row).token_id == 1


@BY_ISA
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 99])
def test_logits_that_are_not_finite_are_an_error(isa, bad, place):
    logits = np.zeros(100, np.float32)
    logits[place] = bad
    assert native(isa, logits, row_of()).token_id == -1
    assert sampler.sample(logits, row_of()).error


@BY_ISA
def test_minus_infinity_is_never_drawn(isa):
    logits = np.full(100, -np.inf, np.float32)
    assert native(isa, logits, row_of()).token_id == -1
    logits[[7, 50]] = 0
    drawn = {native(isa, logits, row_of(seed=seed, logprobs=2)).token_id for seed in range(100)}
    assert drawn == {7, 50}
    assert native(isa, logits, row_of(temperature=0.0, banned_ids=(7,))).token_id == 50
    assert native(isa, logits, row_of(banned_ids=(7, 50))).token_id == -1


@BY_ISA
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 3])
def test_only_what_is_allowed_is_drawn(isa, temperature, top_k):
    """Also an id of a last word that is not full. A ban gives way where it leaves nothing."""
    rng = np.random.default_rng(4)
    logits = rng.standard_normal(70).astype(np.float32)
    allowed = np.isin(np.arange(70), [3, 69])
    for banned, expected in (((), {3, 69}), ((3,), {69}), ((3, 69), {3, 69}), ((3, 5, 69), {3, 69})):
        for seed in range(50):
            row = row_of(
                temperature=temperature,
                top_k=top_k,
                seed=seed,
                allowed=allowed,
                banned_ids=banned,
                logprobs=1,
            )
            sampled, plain = native(isa, logits, row), sampler.sample(logits, row)
            assert sampled.token_id == plain.token_id
            assert sampled.token_id in expected
            assert sampled.top_ids == [int(logits.argmax())]  # of the model itself


@BY_ISA
def test_nothing_allowed_is_an_error(isa):
    row = row_of(allowed=np.zeros(100, np.bool_), banned_ids=(3,))
    assert native(isa, np.zeros(100, np.float32), row).token_id == -1
    assert sampler.sample(np.zeros(100, np.float32), row).error == sampler.NOTHING_LEFT


@BY_ISA
def test_a_set_of_another_vocabulary_is_refused(isa):
    with pytest.raises(ValueError, match="a bit per id"):
        native(isa, np.zeros(100, np.float32), row_of(allowed=np.ones(64, np.bool_)))


@BY_ISA
def test_the_callers_logits_stay_as_they_are(isa):
    logits = np.arange(20, dtype=np.float32)
    native(isa, logits, row_of(logit_bias={3: 5.0}, banned_ids=(19,)))
    assert np.array_equal(logits, np.arange(20))


def test_uniform_is_exactly_the_definition():
    rng = np.random.default_rng(2)
    cases = [
        (0, 0),
        (2**64 - 1, 2**31),
        *zip(rng.integers(0, 2**63, 500), rng.integers(0, 2**31, 500), strict=True),
    ]
    for seed, position in cases:
        value = _native.uniform(int(seed), int(position))
        assert value == sampler.uniform(int(seed), int(position))
        assert 0 <= value < 1
