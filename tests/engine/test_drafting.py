"""Drafts change how fast an answer comes, never what it says; and those that are right are counted."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from fake_runner import (
    FakeRunner,
    PlantedDrafter,
    answer,
    check_against_solo,
    collect,
    make_engine,
    random_requests,
    run,
    run_schedule,
    solo,
)

from jinn.engine.drafting import History, ModelDrafter, MtpDrafter, NgramDrafter
from jinn.engine.messages import SamplingParams, Submit
from jinn.engine.sampler import sample


@pytest.mark.parametrize("num_state_slots", [0, 30])
@pytest.mark.parametrize("num_right", range(5))
def test_any_number_of_right_drafts_gives_the_same_bytes(num_right, num_state_slots):
    rng = random.Random(num_right)
    requests = random_requests(rng, 12)
    drafter = PlantedDrafter(requests, 4, num_right, num_state_slots=num_state_slots)
    engine = make_engine(FakeRunner(40, 4, num_state_slots=num_state_slots), drafter)
    check_against_solo(requests, run_schedule(engine, requests, rng), num_state_slots=num_state_slots)
    stats = engine.stats
    assert stats.num_draft_tokens
    if num_right == 0:
        assert stats.num_accepted_tokens == 0
    else:
        assert 0 < stats.num_accepted_tokens <= num_right * stats.num_drafts


def test_right_drafts_save_steps_and_are_counted():
    request = Submit("r", "", (1, 2, 3), SamplingParams(seed=1, max_tokens=21, ignore_eos=True))
    engine = make_engine(FakeRunner(40, 4), PlantedDrafter([request], 4, 4))
    engine.submit(request)
    outputs = collect(run(engine))["r", 0]
    assert answer(outputs) == solo(request)
    assert [len(output.token_ids) for output in outputs] == [1, 5, 5, 5, 5]
    assert [output.num_accepted_tokens for output in outputs] == [0, 4, 4, 4, 4]
    assert engine.stats.num_accepted_tokens == engine.stats.num_draft_tokens == 16
    assert engine.stats.num_drafts == 4
    assert engine.stats.num_generation_tokens == 21


def test_drafts_go_no_further_than_the_answer_may():
    for max_tokens in range(1, 9):
        request = Submit("r", "", (1, 2), SamplingParams(seed=1, max_tokens=max_tokens, ignore_eos=True))
        engine = make_engine(FakeRunner(40, 4), PlantedDrafter([request], 7, 7))
        engine.submit(request)
        assert answer(collect(run(engine))["r", 0]) == solo(request)


def test_a_broken_token_among_drafts_fails_only_when_it_is_drawn():
    request = Submit("r", "", (1, 2), SamplingParams(seed=1, max_tokens=9, ignore_eos=True))
    truth = solo(request)[0]
    wrong = next(token_id for token_id in range(1, 23) if token_id not in (*truth, 1, 2))
    drafter = PlantedDrafter([request], 0, 0)
    drafter.draft = lambda chunks: [setattr(c.sequence, "drafts", (wrong, wrong)) for c in chunks]
    engine = make_engine(FakeRunner(40, 4, nan_id=wrong), drafter)
    engine.submit(request)
    assert answer(collect(run(engine))["r", 0]) == solo(request)


def history(token_ids, max_drafts=4):
    made = History(max_drafts, list(token_ids))
    return made.continuation()


def test_ngrams_continue_what_came_before():
    assert history([1, 2, 3, 4, 5, 6, 1, 2, 3]) == (4, 5, 6, 1)
    assert history([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]) == (5, 1, 2, 3), "the latest occurrence counts"
    assert history([9, 1, 2, 3, 7, 8, 1, 2, 3, 5, 9, 1, 2, 3]) == (7, 8, 1, 2), "the longer run counts"
    assert history([5, 5, 5, 5]) == (5, 5, 5, 5), "past the end it goes on as it went"
    assert history([1, 2, 1, 2, 1, 2]) == (1, 2, 1, 2)
    assert history([1, 2, 3, 4, 5]) == ()
    assert history([]) == ()


def test_an_index_grows_with_the_text():
    rng = random.Random(0)
    tokens = [rng.randrange(3) for _ in range(200)]
    grown = History(4, tokens[:1])
    for before, after in pairwise(range(1, 200)):
        grown.extend(tokens[before:after])
        assert grown.continuation() == history(tokens[:after])


@pytest.mark.parametrize("num_state_slots", [0, 20])
def test_ngram_drafts(num_state_slots):
    rng = random.Random(3)
    requests = random_requests(rng, 12)
    engine = make_engine(FakeRunner(40, 4, num_state_slots=num_state_slots), NgramDrafter(4))
    check_against_solo(requests, run_schedule(engine, requests, rng), num_state_slots=num_state_slots)
    assert not engine._drafter._histories


def repeating(num_tokens):
    """A bias so strong that the answer is one token again and again."""
    sampling = SamplingParams(seed=1, max_tokens=num_tokens, logit_bias={7: 100.0}, ignore_eos=True)
    return Submit("r", "", (1, 2, 3), sampling)


def test_ngrams_save_steps_on_text_that_repeats_itself():
    engine = make_engine(FakeRunner(40, 4), NgramDrafter(4))
    engine.submit(repeating(50))
    steps = run(engine)
    assert answer(collect(steps)["r", 0]) == solo(repeating(50))
    assert len(steps) < 20


def test_a_draft_model_that_is_the_model_itself_is_always_right():
    request = Submit("r", "", (1, 2, 3), SamplingParams(seed=5, max_tokens=21, ignore_eos=True, top_p=0.9))
    engine = make_engine(FakeRunner(40, 4), ModelDrafter(FakeRunner(40, 4), 4, 512))
    engine.submit(request)
    steps = run(engine)
    assert answer(collect(steps)["r", 0]) == solo(request)
    assert engine.stats.num_accepted_tokens == engine.stats.num_draft_tokens == 16


class Forgetful(FakeRunner):
    """A model that is right some of the time."""

    def step(self, batch, rows):
        lines = self.logits(batch)
        lines[:: 1 + len(self.batch_sizes) % 2, :7] = -1.0
        return [sample(line, row) for line, row in zip(lines, rows, strict=True)]


@pytest.mark.parametrize("num_blocks", [12, 200])
def test_a_draft_model_with_scarce_blocks(num_blocks):
    rng = random.Random(5)
    requests = random_requests(rng, 12)
    drafter = ModelDrafter(Forgetful(num_blocks, 4), 3, 5)
    engine = make_engine(FakeRunner(40, 4), drafter)
    check_against_solo(requests, run_schedule(engine, requests, rng))
    assert not drafter._read
    assert drafter._cache.num_available_blocks == num_blocks
    assert 0 < engine.stats.num_accepted_tokens < engine.stats.num_draft_tokens


class Predicting(FakeRunner):
    """Its hidden state is the token read, and its module predicts from both tokens of a pair."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.pairs = {}

    def logits(self, batch):
        self.hidden = batch.token_ids[:, None].astype(np.float32)
        return super().logits(batch)

    def last_hidden(self):
        return self.hidden

    def predict(self, batch, rows):
        previous = batch.hidden[:, 0].astype(int)
        for index, blocks in enumerate(batch.block_tables.tolist()):
            start, stop = batch.query_start[index : index + 2].tolist()
            for token in range(start, stop):
                position = int(batch.positions[token])
                place = blocks[position // self.block_size], position % self.block_size
                self.pairs[place] = previous[token], int(batch.token_ids[token])
        self.hidden = batch.token_ids[:, None].astype(np.float32)
        lines = np.zeros((len(rows), self.vocab_size), np.float32)
        lines[:, 7] = 50.0
        return [sample(line, row) for line, row in zip(lines, rows, strict=True)]


def test_predicted_drafts_are_right_where_the_module_is():
    engine = make_engine(Predicting(4, 64), MtpDrafter(Predicting(4, 64), 3))
    engine._drafter._runner = engine._runner
    engine.submit(repeating(21))
    steps = run(engine)
    assert answer(collect(steps)["r", 0]) == solo(repeating(21))
    assert engine.stats.num_accepted_tokens == engine.stats.num_draft_tokens == 15
    assert len(steps) == 6


@pytest.mark.parametrize("num_state_slots", [0, 20])
def test_predicted_pairs_are_those_of_neighbours(num_state_slots):
    rng = random.Random(6)
    requests = [
        replace(request, sampling=replace(request.sampling, logit_bias={7: 6.0}))
        for request in random_requests(rng, 12)
    ]
    runner = Predicting(200, 4, num_state_slots=num_state_slots)
    engine = make_engine(runner, MtpDrafter(runner, 3), max_num_batched_tokens=9)
    check_against_solo(requests, run_schedule(engine, requests, rng), num_state_slots=num_state_slots)
    assert 0 < engine.stats.num_accepted_tokens < engine.stats.num_draft_tokens
    engine = make_engine(runner, MtpDrafter(runner, 3), max_num_batched_tokens=9)
    runner.pairs.clear()
    request = replace(requests[0], prompt_ids=tuple(range(1, 20)))
    engine.submit(request)
    outputs = collect(run(engine))[request.request_id, 0]
    text = (*request.prompt_ids, *answer(outputs)[0])
    assert [runner.pairs[p // 4, p % 4] for p in range(18)] == list(pairwise(text))[:18]
