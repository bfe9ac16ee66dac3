from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

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
)

from jinn.engine.messages import SamplingParams, Submit, ThinkingBudget
from jinn.engine.thinking import Thinking

START, END, LINE = 3, 4, 5


def thinking(max_tokens: int, *, is_open: bool = True) -> Thinking:
    return Thinking.start(ThinkingBudget(max_tokens, None if is_open else START, END, (LINE, END)))


def forced_ids(thinking: Thinking, token_ids: list[int]) -> list[int | None]:
    """What is forced before each token, and after the last; foreseen from the start alike."""
    foreseen = [thinking.forced_id(token_ids[:count]) for count in range(len(token_ids) + 1)]
    forced = []
    for token_id in token_ids:
        forced.append(thinking.forced_id())
        thinking.advance(token_id)
    forced.append(thinking.forced_id())
    assert foreseen == forced
    return forced


@pytest.mark.parametrize(
    ("max_tokens", "is_open", "token_ids", "forced"),
    [
        (2, True, [7, 7, LINE, END, 7], [None, None, LINE, END, None, None]),
        (0, True, [LINE, END, 7], [LINE, END, None, None]),
        (2, True, [7, END, 7, 7], [None] * 5),
        (2, True, [7, END, START, 7, 7, 7], [None] * 7),
        (1, False, [7, START, 7, LINE, END, START, 7], [None, None, None, LINE, END, None, None, None]),
        (0, False, [START, LINE, END], [None, LINE, END, None]),
        (1, False, [7, 7, END, 7], [None] * 5),
    ],
)
def test_what_is_forced(
    max_tokens: int, is_open: bool, token_ids: list[int], forced: list[int | None]
) -> None:
    assert forced_ids(thinking(max_tokens, is_open=is_open), token_ids) == forced


def request(max_tokens: int, name: str = "r", **sampling: Any) -> Submit:
    budget = ThinkingBudget(max_tokens, None, END, (LINE, END))
    fields = {"seed": 5, "max_tokens": 12, "logit_bias": {END: -100.0}, "thinking_budget": budget, **sampling}
    return Submit(name, "t", tuple(range(1, 11)), SamplingParams(**fields))


def test_the_answer_follows_the_closed_thoughts() -> None:
    def drawn(request: Submit) -> tuple[int, ...]:
        engine = make_engine(FakeRunner(64, 4))
        engine.submit(request)
        ids: tuple[int, ...] = answer(collect(run(engine))["r", 0])[0]
        return ids

    free, bound = drawn(request(100, ignore_eos=True)), drawn(request(3, ignore_eos=True))
    assert bound[:5] == (*free[:3], LINE, END)
    assert len(bound) == len(free) == 12
    assert END not in free


def test_a_forced_token_has_the_models_log_probability() -> None:
    engine = make_engine(FakeRunner(64, 4, vocab_size=20))
    engine.submit(request(0, logprobs=20, temperature=0.0))
    outputs = collect(run(engine))["r", 0]
    (logprobs,) = outputs[0].logprobs
    assert outputs[0].token_ids == (LINE,)
    assert dict(logprobs.top)[LINE] == logprobs.logprob


def test_any_schedule_gives_the_bytes_of_running_alone() -> None:
    rng = random.Random(3)
    requests = [
        request(
            rng.randrange(6), f"r{index}", temperature=rng.choice((0.0, 1.0)), presence_penalty=rng.random()
        )
        for index in range(12)
    ]
    engine = make_engine(FakeRunner(12, 4), max_num_batched_tokens=7, max_num_seqs=5)
    check_against_solo(requests, run_schedule(engine, requests, rng))


@pytest.mark.parametrize("num_right", range(5))
def test_drafts_change_nothing(num_right: int) -> None:
    """They cross the places where the thoughts are closed."""
    rng = random.Random(num_right)
    requests = [
        replace(drawn, sampling=replace(drawn.sampling, thinking_budget=random_budget(rng)))
        for drawn in random_requests(rng, 12)
    ]
    drafter = PlantedDrafter(requests, 4, num_right)
    engine = make_engine(FakeRunner(40, 4), drafter)
    check_against_solo(requests, run_schedule(engine, requests, rng))
    assert engine.stats.num_draft_tokens


def random_budget(rng: random.Random) -> ThinkingBudget:
    return ThinkingBudget(rng.randrange(6), rng.choice((None, START)), END, (LINE, END))


def test_a_budget_must_close() -> None:
    with pytest.raises(ValueError, match="thinking_budget must close"):
        ThinkingBudget(1, None, END, (LINE,))
    with pytest.raises(ValueError, match="thinking_budget"):
        ThinkingBudget(-1, None, END, (END,))
