from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinn.engine.messages import SamplingParams
from jinn.engine.sampler import SampleRow, adjusted, draw, sample, uniform

NONE = np.empty(0, np.int32)


def make_row(seed=1, position=0, seen=(), counts=(), banned=(), **sampling):
    return SampleRow(
        SamplingParams(**sampling),
        seed,
        position,
        np.array(seen, np.int32),
        np.array(counts, np.int32),
        banned,
    )


def logits_of(*values):
    return np.array(values, np.float32)


def test_uniform_is_splitmix64():
    """The first outputs for seed 0, as published with the generator (Vigna's splitmix64.c)."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [uniform(0, i) for i in range(4)] == [(value >> 11) / 2**53 for value in published]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_uniform_is_in_range(seed, position):
    assert 0.0 <= uniform(seed, position) < 1.0


def test_uniform_is_uniform_over_positions_and_over_neighbouring_seeds():
    for draws in ([uniform(7, p) for p in range(4000)], [uniform(s, 7) for s in range(4000)]):
        counts, _ = np.histogram(draws, 20, (0, 1))
        assert ((counts - 200) ** 2 / 200).sum() < 60  # chi-square, 19 degrees of freedom


def naive_kept(logits, sampling):
    """The ids that the filters leave, and their probabilities, step by step with plain Python."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    largest = logits[order[0]]
    weights = {i: math.exp((logits[i] - largest) / sampling.temperature) for i in order}
    order = [i for i in order if weights[i] >= sampling.min_p]
    total, reached, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if kept and reached >= sampling.top_p * total:
            break
        kept.append(i)
        reached += weights[i]
    return {i: weights[i] / reached for i in sorted(kept)}


@given(
    st.lists(st.integers(-20, 20).map(lambda v: v / 4), min_size=1, max_size=12),
    st.floats(0.1, 3.0),
    st.integers(0, 5),
    st.sampled_from([1.0, 0.999, 0.7, 0.3, 0.01]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.integers(0, 2**63),
)
def test_draw_is_the_inverse_of_the_filtered_distribution(values, temperature, top_k, top_p, min_p, seed):
    row = make_row(seed, 3, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = naive_kept(values, row.sampling)
    u = uniform(seed, 3)
    drawn = sample(logits_of(*values), row).token_id
    assert drawn in kept
    below = math.fsum(probability for i, probability in kept.items() if i < drawn)
    assert below - 1e-12 <= u < below + kept[drawn] + 1e-12


def test_the_ends_of_the_unit_interval():
    values = np.array([-math.inf, 1.0, 2.0, -math.inf])
    assert draw(values, SamplingParams(), 0.0) == 1
    assert draw(values, SamplingParams(), 1.0 - 2.0**-53) == 2


def test_frequencies_follow_the_probabilities():
    logits = logits_of(0.0, 1.0, 2.0, -math.inf)
    row = make_row()
    draws = [sample(logits, replace(row, position=p)).token_id for p in range(6000)]
    expected = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    counts = np.bincount(draws, minlength=4)
    assert counts[3] == 0
    assert ((counts[:3] - 6000 * expected) ** 2 / (6000 * expected)).sum() < 20


def test_ties_go_to_the_lower_id():
    logits = logits_of(1.0, 3.0, 3.0, 3.0)
    assert sample(logits, make_row(temperature=0.0)).token_id == 1
    draws = {sample(logits, make_row(seed, top_k=2)).token_id for seed in range(200)}
    assert draws == {1, 2}
    assert {sample(logits, make_row(seed, top_p=0.4)).token_id for seed in range(200)} == {1, 2}


def test_a_tiny_temperature_takes_the_largest():
    for temperature in (1e-300, 5e-324):
        assert sample(logits_of(1.0, 2.0, -3.4e38), make_row(temperature=temperature)).token_id == 1


def test_penalties_and_biases():
    row = make_row(
        seen=(0, 1, 2),
        counts=(0, 2, 1),
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={2: -3.0, 3: 100.0},
        banned=(4,),
    )
    values = adjusted(logits_of(4.0, 4.0, 1.0, 1.0, 50.0), row)
    # 0: seen in the prompt only; 1: generated twice; 2: 1 - 3 = -2, doubled; 3: not seen; 4: banned
    assert values.tolist() == [2.0, 2.0 - 0.5 - 0.5, -4.0 - 0.5 - 0.25, 101.0, -math.inf]


def test_a_bias_does_not_lift_a_ban():
    row = make_row(temperature=0.0, logit_bias={1: 100.0}, banned=(1,))
    assert sample(logits_of(0.0, 0.0), row).token_id == 0


def test_logprobs_are_of_the_raw_logits():
    logits = np.random.default_rng(0).normal(0, 3, 50).astype(np.float32)
    row = make_row(temperature=0.5, top_k=3, logit_bias={7: 100.0}, logprobs=4)
    drawn = sample(logits, row)
    exact = logits.astype(np.float64) - math.log(math.fsum(math.exp(v) for v in logits.tolist()))
    assert drawn.token_id == 7
    assert drawn.logprobs.logprob == pytest.approx(exact[7], abs=1e-6)
    assert [i for i, _ in drawn.logprobs.top] == np.argsort(-exact)[:4].tolist()
    for token_id, value in drawn.logprobs.top:
        assert value == pytest.approx(exact[token_id], abs=1e-6)
        assert float(np.float32(value)) == value


def test_logprobs_of_ties_and_of_more_than_there_are():
    top = sample(logits_of(0.0, 0.0, 0.0), make_row(logprobs=20)).logprobs.top
    assert [i for i, _ in top] == [0, 1, 2]
    assert sample(logits_of(0.0), make_row(logprobs=0)).logprobs.top == ()
    assert sample(logits_of(0.0), make_row()).logprobs is None


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, -math.inf), (1.0, math.nan)])
def test_logits_that_are_not_finite_are_an_error(bad):
    for temperature in (0.0, 1.0):
        drawn = sample(logits_of(*bad), make_row(temperature=temperature))
        assert "finite" in drawn.error
        assert drawn.token_id == -1


def test_all_banned_is_an_error():
    assert "min_tokens" in sample(logits_of(1.0, 2.0), make_row(banned=(0, 1))).error
    assert "min_tokens" in sample(logits_of(1.0, -math.inf), make_row(banned=(0,))).error
