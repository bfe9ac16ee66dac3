from __future__ import annotations

import math
import random

import pytest

from jinn.plan.chips import find_chip
from jinn.plan.efficiency import find_efficiency
from jinn.plan.queueing import Wait, erlang_c, first_token, queue_wait, simulate
from jinn.plan.serving import Instance, Workload, shared_load
from jinn.plan.shapes import shape_of
from jinn.plan.speed import Machine, Placement


def instance(name="Qwen3-8B", chip="NVIDIA H100 SXM"):
    machine = Machine(find_chip(chip), find_efficiency(chip, "vllm", "dense", "bf16"))
    return Instance(shape_of(name), machine, Placement())


def test_erlang_c():
    assert erlang_c(1, 0.7) == pytest.approx(0.7)  # M/M/1
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)


def test_single_server_waits():
    """Pollaczek and Khinchine: W = rate E[S^2] / (2 (1 - load))."""
    wait = queue_wait(0.8, 1.0, variation=0.0)
    assert wait.mean == pytest.approx(0.8 / (2 * 0.2))
    assert queue_wait(0.8, 1.0, variation=1.0).mean == pytest.approx(4.0)
    assert queue_wait(1.0, 1.0, variation=0.0) is None


def test_percentiles_of_a_gamma():
    rng = random.Random(0)
    draws = sorted(rng.gammavariate(4, 0.5) for _ in range(100_000))
    wait = Wait(2.0, 1.0)
    for share in (0.5, 0.9, 0.99):
        assert wait.percentile(share) == pytest.approx(draws[int(share * len(draws))], rel=0.02)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_simulation_and_closed_form_agree(share):
    one, workload = instance(), Workload(1000, 200, variation=0.5)
    rate = share * one.prefill_rate(workload) / workload.new_tokens / 3
    played = simulate(one, workload, rate, 1000, num_requests=1500)
    load = shared_load(one, workload, rate)
    wait = first_token(one, workload, rate, load.num_seqs)
    assert sum(played.first_token) / len(played.first_token) == pytest.approx(wait.mean, rel=0.3)
    assert sum(played.token) / len(played.token) == pytest.approx(load.token_seconds, rel=0.15)
    assert played.mean_num_seqs == pytest.approx(load.num_seqs, rel=0.25)


def test_the_simulation_serves_everyone_and_repeats():
    one, workload = instance(), Workload(500, 20, variation=1.0)
    played = simulate(one, workload, 20.0, max_num_seqs=4, num_requests=300)
    assert len(played.first_token) == 300
    assert played == simulate(one, workload, 20.0, max_num_seqs=4, num_requests=300)
    assert played != simulate(one, workload, 20.0, max_num_seqs=4, num_requests=300, seed=1)
    assert played.mean_num_seqs <= 4
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in played.first_token)


def test_more_load_waits_longer():
    one, workload = instance(), Workload(2000, 100)
    means = [first_token(one, workload, rate, 4.0).mean for rate in (1.0, 5.0, 10.0)]
    assert means == sorted(means)
