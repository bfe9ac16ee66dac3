from __future__ import annotations

import numpy as np
import pytest
from fake_runner import FakeRunner

from jinn.cli.bench import load_benchmark
from jinn.engine.benchmark import Benchmark, Limits, num_blocks
from models.transformers_models import random_model


class RecordingRunner(FakeRunner):
    """Keeps the batches it was given."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.batches = []

    def step(self, batch, rows):
        self.batches.append(batch)
        return super().step(batch, rows)


@pytest.fixture
def runner():
    return RecordingRunner(num_blocks(3, 21, 4), 4)


@pytest.fixture
def benchmark(runner):
    return Benchmark(runner, num_seqs=3, max_len=21, chunk_size=8)


def test_prefill_reads_the_prompt_in_chunks_and_draws_once(runner, benchmark):
    assert benchmark.prefill_seconds(20) > 0
    assert [batch.positions.tolist() for batch in runner.batches] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]
    assert [batch.logit_rows.tolist() for batch in runner.batches] == [[], [], [3]]


def test_decode_draws_for_each_sequence_at_its_depth(runner, benchmark):
    times = benchmark.decode_seconds(3, 2, depth=9)
    assert len(times) == 2
    assert min(times) > 0
    reading, drawing = runner.batches[:-2], runner.batches[-2:]
    assert sum(len(batch.token_ids) for batch in reading) == 3 * 9
    assert [batch.positions.tolist() for batch in drawing] == [[9] * 3, [10] * 3]
    assert [batch.context_lens.tolist() for batch in drawing] == [[10] * 3, [11] * 3]
    assert [batch.logit_rows.tolist() for batch in drawing] == [[0, 1, 2]] * 2
    assert len(np.unique(drawing[0].block_tables)) == runner.num_blocks


def test_runs_repeat_their_tokens(runner, benchmark):
    for _ in range(2):
        benchmark.decode_seconds(3, 2, depth=0)
        benchmark.prefill_seconds(20)
    ids = [batch.token_ids.tolist() for batch in runner.batches]
    assert ids[: len(ids) // 2] == ids[len(ids) // 2 :]
    assert ids[0] != ids[1]


def test_decode_at_depth_0_reads_nothing(runner, benchmark):
    benchmark.decode_seconds(2, 3, depth=0)
    assert [batch.positions.tolist() for batch in runner.batches] == [[0, 0], [1, 1], [2, 2]]


def test_what_is_read_is_not_read_again(runner, benchmark):
    benchmark.prefill_seconds(12)
    del runner.batches[:]
    benchmark.decode_seconds(2, 1, depth=12)
    assert [batch.context_lens.tolist() for batch in runner.batches] == [[8], [12], [13, 13]]
    benchmark.decode_seconds(2, 1, depth=9)
    assert [batch.context_lens.tolist() for batch in runner.batches[3:]] == [[10, 10]]


def test_limits_add_up_the_times():
    limits = Limits(read_bandwidth=1.0, int8=8.0, bf16=4.0, f32=2.0)
    assert limits.seconds({"int8": 8.0, "f32": 1.0}) == 1.5


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
def test_models_with_recurrent_states_are_timed(family, tmp_path):
    random_model(f"{family} for llama.cpp").save_pretrained(tmp_path)
    benchmark = load_benchmark(tmp_path, 3, 24, num_threads=1)
    assert benchmark.prefill_seconds(20) > 0
    assert min(benchmark.decode_seconds(3, 4, depth=20)) > 0
    whole, stages = benchmark.prefill_seconds(20), benchmark.prefill_stage_seconds(20)
    assert len(stages) > 1
    assert 0 < sum(stages) < 100 * whole
