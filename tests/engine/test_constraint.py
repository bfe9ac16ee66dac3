"""Answers that are held to a grammar, on a runner whose logits are noise."""

from __future__ import annotations

import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import llguidance
import pytest
from fake_runner import (
    FakeRunner,
    answer,
    check_against_solo,
    collect,
    make_engine,
    random_requests,
    run,
    run_schedule,
)
from letters import EOS, TEXTS, THINK_END, LetterTokenizer, text_of

from jinn.engine import constraint
from jinn.engine.constraint import Constraint, GrammarError, Vocabulary
from jinn.engine.messages import Abort, FinishReason, Grammar, SamplingParams, Submit, ThinkingBudget
from jinn.engine.sampler import unpacked

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["ab", "b"]}, "b": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
COMPACT = {"whitespace_flexible": False}


def schema_grammar(schema=SCHEMA):
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)


def regex_grammar(pattern):
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def make_request(text, request_id="r", after_id=None, **sampling):
    sampling = SamplingParams(**{"seed": 1, "max_tokens": 40, **sampling})
    return Submit(request_id, "t", (5, 6, 7), sampling, Grammar(text, after_id))


def serve(*requests, **settings):
    engine = make_engine(FakeRunner(64, 4), **settings)
    for request in requests:
        engine.submit(request)
    return {key: answer(outputs) for key, outputs in collect(run(engine)).items()}


def check_valid(ids):
    *ids, last = ids
    assert last == EOS
    value = json.loads(text_of(ids))
    assert list(value) == ["a", "b"]
    assert value["a"] in ("ab", "b")
    assert all(type(item) is int for item in value["b"])


def test_every_finished_answer_is_valid():
    requests = [make_request(schema_grammar(), f"r{seed}", seed=seed, n=2) for seed in range(40)]
    reasons = []
    for ids, _, reason, error in serve(*requests).values():
        assert error is None
        reasons.append(reason)
        if reason is FinishReason.STOP:
            check_valid(ids)
        else:
            assert len(ids) == 40
    assert reasons.count(FinishReason.STOP) > len(reasons) / 2


def test_an_answer_is_the_same_alone_and_in_any_company():
    """With preemption, aborts and prefix reuse; half of the requests have a grammar."""
    rng = random.Random(5)
    for _ in range(4):
        texts = [schema_grammar(), regex_grammar("[ab]{3,9}"), regex_grammar("(ab|01)*"), None, None, None]
        requests = [
            replace(request, grammar=Grammar(text) if (text := rng.choice(texts)) else None)
            for request in random_requests(rng, 12)
        ]
        engine = make_engine(FakeRunner(20, 4), max_model_len=64)
        check_against_solo(requests, run_schedule(engine, requests, rng))


def test_max_tokens_ends_an_answer_that_is_not_whole():
    ids, _, reason, _ = serve(make_request(regex_grammar("[ab]{30}"), max_tokens=5))["r", 0]
    assert (len(ids), reason) == (5, FinishReason.LENGTH)


def test_a_dead_end_is_an_error_and_the_neighbour_goes_on():
    """z is in no token."""
    neighbour = make_request(regex_grammar("[ab]{5}"), "neighbour")
    answers = serve(make_request(regex_grammar("ab?z")), neighbour)
    ids, _, reason, error = answers["r", 0]
    assert EOS not in ids
    assert reason is FinishReason.ERROR
    assert "grammar" in error
    assert answers["neighbour", 0][2] is FinishReason.STOP


def test_a_grammar_that_becomes_too_costly_is_an_error(monkeypatch):
    """llguidance then offers the end of the answer."""
    limits = llguidance.LLParserLimits(step_lexer_fuel=10, verbose_errors=False)
    monkeypatch.setattr(constraint, "parser_limits", lambda: limits)
    _, _, reason, error = serve(make_request(regex_grammar("(a|b|01){1,200}-")))["r", 0]
    assert reason is FinishReason.ERROR
    assert "lexer" in error


def test_a_bad_grammar_is_an_error_in_one_line():
    ids, _, reason, error = serve(make_request("start: nobody"))["r", 0]
    assert (ids, reason) == ((), FinishReason.ERROR)
    assert error
    assert "\n" not in error


def test_a_model_without_a_tokenizer_refuses_grammars():
    engine = make_engine(FakeRunner(64, 4))
    engine._load_tokenizer = None
    engine.submit(make_request(regex_grammar("a")))
    assert "tokenizer" in answer(collect(run(engine))["r", 0])[3]


@pytest.mark.parametrize("sampling", [{"min_tokens": 30}, {"ignore_eos": True}])
def test_an_answer_ends_where_its_grammar_leaves_nothing_to_add(sampling):
    ids, _, reason, _ = serve(make_request(regex_grammar("[ab]{5}"), **sampling))["r", 0]
    assert len(text_of(ids)) == 5
    assert reason is FinishReason.STOP


@pytest.mark.parametrize("sampling", [{"min_tokens": 30}, {"ignore_eos": True}])
def test_an_answer_goes_on_while_its_grammar_can(sampling):
    for seed in range(20):
        ids, _, _, _ = serve(make_request(regex_grammar("[ab]{1,500}"), seed=seed, **sampling))["r", 0]
        assert len(ids) >= 30


def test_a_stop_id_ends_an_answer_only_where_it_is_whole():
    stop_id = TEXTS.index("a")
    endings = set()
    for seed in range(40):
        request = make_request(regex_grammar("(ab|ba){2,20}"), seed=seed, stop_token_ids=(stop_id,))
        ids, _, reason, _ = serve(request)["r", 0]
        if reason is FinishReason.STOP:
            endings.add(ids[-1])
            assert re.fullmatch("(ab|ba){2,20}", text_of(ids[:-1]))
    assert endings == {EOS, stop_id}


def test_the_grammar_begins_after_the_reasoning():
    after = 0
    for seed in range(20):
        ids, _, reason, _ = serve(make_request(regex_grammar("ab01"), after_id=THINK_END, seed=seed))["r", 0]
        if reason is FinishReason.STOP:
            after += 1
            assert text_of(ids[ids.index(THINK_END) + 1 :]) == "ab01"
        else:
            assert THINK_END not in ids or len(ids) == 40
    assert after


def test_an_answer_may_begin_without_reasoning():
    opening_id, beginnings = TEXTS.index("{"), set()
    for seed in range(40):
        request = make_request(regex_grammar("[ab]{4}"), seed=seed, max_tokens=60)
        request = replace(
            request, grammar=replace(request.grammar, after_id=THINK_END, opening_id=opening_id)
        )
        ids, _, reason, _ = serve(request)["r", 0]
        if reason is FinishReason.STOP:
            has_thought = ids[0] == opening_id
            beginnings.add(has_thought)
            answer_ids = ids[ids.index(THINK_END) + 1 :] if has_thought else ids
            assert re.fullmatch("[ab]{4}", text_of(answer_ids))
    assert beginnings == {True, False}


def test_what_closes_thoughts_is_no_part_of_the_grammar():
    """The budget's last tokens come after the one that the grammar waits for."""
    comma = TEXTS.index(",")
    budget = ThinkingBudget(3, None, THINK_END, (comma, THINK_END, comma))
    for seed in range(20):
        request = make_request(
            regex_grammar("[ab]{4}"), after_id=THINK_END, seed=seed, thinking_budget=budget
        )
        ids, _, reason, _ = serve(request)["r", 0]
        text = text_of(ids[ids.index(THINK_END) + 1 :])
        assert reason is FinishReason.STOP
        assert re.fullmatch(",?[ab]{4}", text)


def test_others_are_served_while_a_grammar_is_compiled():
    is_compiling, may_go_on = threading.Event(), threading.Event()

    def load_tokenizer():
        is_compiling.set()
        may_go_on.wait(10)
        return LetterTokenizer()

    engine = make_engine(FakeRunner(64, 4), load_tokenizer=load_tokenizer)
    engine.submit(make_request(regex_grammar("ab"), "slow"))
    assert is_compiling.wait(10)
    engine.submit(replace(make_request("", "fast"), grammar=None))
    steps = []
    while not any(output.finish_reason for step in steps for output in step.outputs):
        steps.append(engine.step())
    assert {output.request_id for step in steps for output in step.outputs} == {"fast"}
    with pytest.raises(ValueError, match="slow is already"):
        engine.submit(make_request(regex_grammar("ab"), "slow"))
    may_go_on.set()
    assert answer(collect(run(engine))["slow", 0])[2] is FinishReason.STOP


@pytest.mark.parametrize("index", [None, 1])
def test_an_abort_while_the_grammar_is_compiled(index):
    may_go_on = threading.Event()

    def load_tokenizer():
        may_go_on.wait(10)
        return LetterTokenizer()

    engine = make_engine(FakeRunner(64, 4), load_tokenizer=load_tokenizer)
    engine.submit(make_request(regex_grammar("ab"), n=2))
    engine.abort(Abort("r", index))
    may_go_on.set()
    reasons = [outputs[-1].finish_reason for _, outputs in sorted(collect(run(engine)).items())]
    assert reasons == [FinishReason.ABORT if index is None else FinishReason.STOP, FinishReason.ABORT]


@pytest.fixture
def vocabulary():
    return Vocabulary(LetterTokenizer(), 23, {EOS})


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def next_ids(masks):
    return [set(unpacked(row, 23).nonzero()[0].tolist()) for row in masks]


@pytest.mark.parametrize("after_id", [None, THINK_END])
def test_masks_after_drafts_are_those_of_taking_them(vocabulary, executor, after_id):
    rng = random.Random(7)
    origin = vocabulary.compile(schema_grammar())
    for _ in range(30):
        drafted = Constraint(vocabulary, origin, executor, after_id=after_id)
        stepped = Constraint(vocabulary, origin, executor, after_id=after_id)
        path = []
        while (choices := next_ids(stepped.masks())[0] - {EOS}) and len(path) < 30:
            path.append(THINK_END if after_id in choices else rng.choice(sorted(choices)))
            stepped.advance(path[-1])
        alone = Constraint(vocabulary, origin, executor, after_id=after_id)
        expected = []
        for token_id in (*path, None):
            expected += next_ids(alone.masks())
            if token_id is not None:
                alone.advance(token_id)
        position = 0
        while position < len(path):
            drafts = path[position : position + rng.randrange(5)]
            for _ in range(2):  # trying drafts leaves no trace
                rows = [row() for row in drafted.start_masks(drafts)]
                assert next_ids(rows) == expected[position : position + len(drafts) + 1]
            for token_id in path[position : position + 1]:
                drafted.advance(token_id)
            position += 1


def test_nothing_may_follow_a_draft_that_may_not_come(vocabulary, executor):
    held = Constraint(vocabulary, vocabulary.compile(regex_grammar("a(b|0)1?")), executor)
    a, b, one, comma = (TEXTS.index(text) for text in "ab1,")
    assert next_ids(held.masks((a, comma, b)))[2:] == [set(), set()]
    assert next_ids(held.masks((a, b, EOS)))[2:] == [{EOS, one}, set()]
    assert held.error is None
    assert next_ids(held.masks())[0] == {a, TEXTS.index("ab")}


def test_a_vocabulary_refuses_what_is_no_grammar(vocabulary):
    for text in ('{"grammars": []}', "start: nobody", "start: /(/"):
        with pytest.raises(GrammarError):
            vocabulary.compile(text)


def test_control_tokens_are_in_no_grammar(vocabulary, executor):
    held = Constraint(vocabulary, vocabulary.compile(regex_grammar("(?s:.)*")), executor)
    assert next_ids(held.masks())[0] == {EOS, *range(2, len(TEXTS))}
