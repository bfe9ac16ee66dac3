from __future__ import annotations

import logging
import random

import pytest
from fake_runner import (
    EOS,
    FakeRunner,
    answer,
    check_against_solo,
    collect,
    make_engine,
    random_requests,
    run,
    run_schedule,
    solo,
)

from jinn.engine.cache import IntegrityError
from jinn.engine.messages import (
    Abort,
    FinishReason,
    SamplingParams,
    Submit,
    ThinkingBudget,
    decode,
    encode,
)


def make_request(name="r", prompt=range(1, 11), tenant="t", **sampling):
    return Submit(name, tenant, tuple(prompt), SamplingParams(**{"seed": 5, "max_tokens": 8, **sampling}))


def serve(engine, *requests):
    for request in requests:
        engine.submit(request)
    return collect(run(engine))


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
@pytest.mark.parametrize(("block_size", "num_blocks"), [(1, 80), (4, 20), (5, 30), (16, 40)])
def test_any_schedule_gives_the_bytes_of_running_alone(chunk, block_size, num_blocks):
    rng = random.Random(f"{chunk} {block_size}")
    requests = random_requests(rng, 16)
    engine = make_engine(
        FakeRunner(num_blocks, block_size), max_num_batched_tokens=chunk, max_num_seqs=rng.randrange(1, 8)
    )
    check_against_solo(requests, run_schedule(engine, requests, rng))
    assert engine.stats.num_used_blocks == 0


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(200))
def test_many_schedules(seed):
    rng = random.Random(seed)
    requests = random_requests(rng, 60)
    block_size = rng.randrange(1, 20)
    num_blocks = -(-64 // block_size) + rng.randrange(8)
    engine = make_engine(
        FakeRunner(num_blocks, block_size),
        max_num_batched_tokens=rng.choice([1, 7, 64, 512]),
        max_num_seqs=rng.randrange(1, 66),
    )
    check_against_solo(requests, run_schedule(engine, requests, rng))


def test_choices_are_what_their_seeds_give_alone():
    request = make_request(n=4, temperature=1.5, logprobs=1)
    engine = make_engine(FakeRunner(64, 4))
    outputs = serve(engine, request)
    answers = [answer(outputs["r", index]) for index in range(4)]
    assert answers == [solo(request, index) for index in range(4)]
    assert len({ids for ids, *_ in answers}) == 4
    assert [len(o) and o[0].num_cached_tokens for o in outputs.values()] == [0] * 4
    assert engine.stats.num_prompt_tokens == 10 + 3  # the prompt once, its last token for each other choice
    assert engine.stats.num_cached_tokens == 3 * 9
    assert engine.stats.num_prefix_queries == 40


@pytest.mark.parametrize("common", [0, 1, 3, 4, 5, 8, 11, 12, 13])
def test_only_tokens_after_the_longest_common_prefix_are_computed(common):
    engine = make_engine(FakeRunner(64, 4))
    serve(engine, make_request("a", range(1, 14), max_tokens=1))
    computed = engine.stats.num_prompt_tokens
    prompt = (*range(1, 1 + common), 20, 21, 22)
    outputs = serve(engine, make_request("b", prompt))
    assert outputs["b", 0][-1].num_cached_tokens == common
    assert engine.stats.num_prompt_tokens - computed == 3
    assert answer(outputs["b", 0]) == solo(make_request(prompt=prompt))


def test_the_last_prompt_token_is_always_computed():
    engine = make_engine(FakeRunner(64, 4))
    for _ in range(3):
        outputs = serve(engine, make_request(prompt=range(1, 13)))
    assert outputs["r", 0][0].num_cached_tokens == 11
    assert engine.stats.num_prompt_tokens == 12 + 1 + 1


def test_a_conversation_finds_its_answer_cached():
    engine = make_engine(FakeRunner(64, 4))
    first = make_request(prompt=range(1, 8), max_tokens=6, ignore_eos=True)
    ids, *_ = answer(serve(engine, first)["r", 0])
    second = make_request(prompt=(*first.prompt_ids, *ids, 9, 9, 9))
    outputs = serve(engine, second)["r", 0]
    assert outputs[0].num_cached_tokens == 7 + 5  # the last token drawn was never computed
    assert answer(outputs) == solo(second)


def test_requests_share_what_a_running_one_has_computed():
    engine = make_engine(FakeRunner(64, 4))
    engine.submit(make_request("a", range(1, 12), max_tokens=20, ignore_eos=True))
    steps = [engine.step() for _ in range(3)]
    drawn = [output.token_ids[0] for step in steps for output in step.outputs]
    engine.submit(make_request("b", (*range(1, 12), *drawn, 21)))
    outputs = collect(run(engine))
    assert outputs["b", 0][0].num_cached_tokens == 11 + 2


def test_tenants_never_find_each_others_tokens():
    engine = make_engine(FakeRunner(64, 4))
    for number in range(50):
        outputs = serve(engine, make_request("a", tenant="a"), make_request("b", tenant=f"b{number}"))
        assert outputs["b", 0][0].num_cached_tokens == 0
        assert outputs["a", 0][0].num_cached_tokens == (9 if number else 0)


def test_a_thousand_aborts_leak_nothing():
    rng = random.Random(0)
    engine = make_engine(FakeRunner(40, 4), max_num_batched_tokens=7)
    requests = random_requests(rng, 1000)
    for number, request in enumerate(requests):
        engine.submit(request)
        for _ in range(rng.randrange(3)):
            engine.step()
        if number >= 8:
            engine.abort(Abort(f"r{number - 8}"))
        if number % 50 == 0:
            engine.check_integrity()
    for number in range(1000):
        engine.abort(Abort(f"r{number}"))
    engine.check_integrity()
    stats = engine.stats
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert not engine._requests
    engine.step()
    assert not engine.has_work
    probe = make_request("probe")
    assert answer(serve(engine, probe)["probe", 0]) == solo(probe)


def test_abort_of_one_choice_leaves_the_others():
    request = make_request(n=3, ignore_eos=True)
    for index in range(3):
        for steps_before in range(4):
            engine = make_engine(FakeRunner(64, 4), max_num_batched_tokens=6)
            engine.submit(request)
            steps = [engine.step() for _ in range(steps_before)]
            engine.abort(Abort("r", index))
            engine.abort(Abort("r", index))
            engine.abort(Abort("unknown"))
            outputs = collect([*steps, *run(engine)])
            for other in {0, 1, 2} - {index}:
                assert answer(outputs["r", other]) == solo(request, other)
            assert outputs["r", index][-1].finish_reason is FinishReason.ABORT


def test_preemption_changes_no_byte_and_ends():
    """Ten times more than fits: everything ends, and nobody is sent back often."""
    rng = random.Random(3)
    requests = [
        make_request(
            f"r{i}", [rng.randrange(1, 23) for _ in range(20)], max_tokens=40, seed=i, ignore_eos=True
        )
        for i in range(24)
    ]
    engine = make_engine(FakeRunner(24, 4), max_num_seqs=16)
    check_against_solo(requests, run_schedule(engine, requests, random.Random(1)))
    assert 0 < engine.stats.num_preemptions <= 4 * len(requests)


def test_no_request_waits_for_more_than_what_came_before_it():
    """A stream of later arrivals does not keep an early one from running."""
    engine = make_engine(FakeRunner(16, 4), max_num_seqs=4)
    engine.submit(make_request("large", range(1, 23), max_tokens=20, ignore_eos=True))
    for number in range(100):
        engine.submit(make_request(f"small{number}", [1 + number % 20] * 3, max_tokens=3, ignore_eos=True))
    done = []
    while engine.has_work:
        for output in engine.step().outputs:
            if output.finish_reason:
                done.append(output.request_id)
    position = done.index("large")
    assert position <= 4 * 20  # three neighbours at most, each gone after three of its twenty tokens
    smalls = [int(name[5:]) for name in done if name != "large"]
    assert all(abs(number - place) <= 4 for place, number in enumerate(smalls))


@pytest.mark.parametrize("nan_in", ["prompt", "output"])
def test_a_nan_ends_its_own_request_only(nan_in):
    prompt = (1, 2, 3, 4, *([22] if nan_in == "prompt" else []), *range(5, 21))  # of several chunks
    bias = {} if nan_in == "prompt" else {22: 100.0}
    bad = make_request("bad", prompt, logit_bias=bias)
    neighbours = [make_request(f"n{i}", (1, 2, 3, 4, i), seed=i, logit_bias={22: -100.0}) for i in range(4)]
    engine = make_engine(FakeRunner(64, 4, nan_id=22), max_num_batched_tokens=7)
    outputs = serve(engine, neighbours[0], bad, *neighbours[1:])
    _ids, _, reason, error = answer(outputs["bad", 0])
    assert reason is FinishReason.ERROR
    assert "finite" in error
    for neighbour in neighbours:
        assert answer(outputs[neighbour.request_id, 0]) == solo(neighbour, nan_id=22)
    assert all(22 not in _token_ids(node) for node in engine._cache._unheld)


def _token_ids(node):
    return [int.from_bytes(node.key[i : i + 4], "big") for i in range(0, len(node.key), 4)]


def test_a_step_that_raises_ends_only_the_request_that_made_it_raise(caplog):
    bad = make_request("bad", (1, 2, 3, 22))
    neighbours = [make_request(f"n{i}", (1, 2, 3, 4, i), seed=i, logit_bias={22: -100.0}) for i in range(4)]
    engine = make_engine(FakeRunner(64, 4, broken_id=22))
    with caplog.at_level(logging.CRITICAL):
        outputs = serve(engine, neighbours[0], bad, *neighbours[1:])
    assert answer(outputs["bad", 0])[2:] == (FinishReason.ERROR, "the model failed on this request")
    for neighbour in neighbours:
        assert answer(outputs[neighbour.request_id, 0]) == solo(neighbour)


def test_a_runner_that_loses_tokens_stops_the_engine():
    engine = make_engine(FakeRunner(64, 4))
    engine._runner.step = lambda batch, rows: []
    engine.submit(make_request())
    with pytest.raises(IntegrityError):
        engine.step()


def forced(token_id, **sampling):
    """Draws `token_id` as long as it may."""
    return make_request(temperature=0.0, logit_bias={token_id: 100.0}, **sampling)


def test_why_a_sequence_ends():
    engine = make_engine(FakeRunner(64, 4))
    cases = [
        (forced(EOS), (EOS,), FinishReason.STOP),
        (forced(EOS, ignore_eos=True), (EOS,) * 8, FinishReason.LENGTH),
        (forced(7, stop_token_ids=(7,)), (7,), FinishReason.STOP),
        (forced(7, stop_token_ids=(7,), ignore_eos=True), (7,), FinishReason.STOP),
        (forced(7), (7,) * 8, FinishReason.LENGTH),
        (forced(7, max_tokens=1), (7,), FinishReason.LENGTH),
        (forced(7, max_tokens=None), (7,) * 54, FinishReason.LENGTH),  # max_model_len is 64
        (forced(7, max_tokens=2**31 - 1), (7,) * 54, FinishReason.LENGTH),
    ]
    for request, ids, reason in cases:
        outputs = serve(engine, request)["r", 0]
        assert (answer(outputs)[0], outputs[-1].finish_reason) == (ids, reason)


def test_min_tokens_bans_what_would_end_the_sequence():
    engine = make_engine(FakeRunner(64, 4))
    for request in (
        forced(EOS, min_tokens=3),
        forced(7, min_tokens=3, stop_token_ids=(7,)),
        forced(7, min_tokens=3, stop_token_ids=(7,), ignore_eos=True),
    ):
        ids, _, reason, _ = answer(serve(engine, request)["r", 0])
        last = ids[-1]
        assert len(ids) == 4
        assert last not in ids[:3]
        assert reason is FinishReason.STOP
    ids, _, reason, _ = answer(serve(engine, forced(EOS, min_tokens=100))["r", 0])
    assert (len(ids), reason) == (8, FinishReason.LENGTH)


def test_a_request_that_bans_everything_ends_with_an_error():
    engine = make_engine(FakeRunner(64, 4))
    request = make_request(min_tokens=1, stop_token_ids=tuple(range(23)))
    assert "min_tokens" in answer(serve(engine, request)["r", 0])[3]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (make_request(prompt=()), "no tokens"),
        (make_request(prompt=[1] * 64), "64 tokens does not fit max_model_len of 64"),
        (make_request(prompt=[23]), "vocabulary of 23"),
        (make_request(prompt=[-1]), "vocabulary"),
        (make_request(prompt=[2**40]), "vocabulary"),
        (make_request(logit_bias={23: 1.0}), "logit_bias"),
        (make_request(stop_token_ids=(23,)), "stop_token_ids"),
        (make_request(thinking_budget=ThinkingBudget(1, None, 3, (3, 23))), "thinking_budget"),
        (make_request(seed=None), "seed"),
        (make_request(stop=("a",)), "stop"),
    ],
)
def test_what_cannot_be_served_ends_with_an_error(request_, words):
    engine = make_engine(FakeRunner(64, 4))
    engine.submit(request_)
    neighbour = make_request("neighbour")
    outputs = serve(engine, neighbour)
    assert words in outputs["r", 0][-1].error
    assert outputs["r", 0][-1].finish_reason is FinishReason.ERROR
    assert answer(outputs["neighbour", 0]) == solo(neighbour)


def test_every_choice_of_a_refused_request_ends():
    outputs = serve(make_engine(FakeRunner(64, 4)), make_request(prompt=(), n=3))
    assert {index for _, index in outputs} == {0, 1, 2}


def test_an_id_in_use_is_refused_and_free_again_at_the_end():
    engine = make_engine(FakeRunner(64, 4))
    engine.submit(make_request())
    with pytest.raises(ValueError, match="r is already"):
        engine.submit(make_request())
    run(engine)
    assert serve(engine, make_request())


def test_a_long_prompt_tells_how_far_it_is():
    engine = make_engine(FakeRunner(64, 4), max_num_batched_tokens=4)
    engine.submit(make_request())
    steps = run(engine)
    progress = [(p.num_computed_tokens, p.num_prompt_tokens) for step in steps for p in step.prefilling]
    assert progress == [(4, 10), (8, 10)]
    engine.submit(make_request(prompt=range(1, 21)))
    progress = [(p.num_computed_tokens, p.num_cached_tokens) for step in run(engine) for p in step.prefilling]
    assert progress == [(14, 10), (18, 10)]


def test_outputs_go_over_the_wire():
    engine = make_engine(FakeRunner(64, 4), max_num_batched_tokens=4)
    for request in random_requests(random.Random(0), 6):
        engine.submit(decode(encode(request)))
    for step in run(engine):
        assert decode(encode(step)) == step


def test_limits_are_clipped_to_the_model_and_the_cache():
    ready = make_engine(FakeRunner(8, 4), max_model_len=100, max_num_seqs=20).ready
    assert (ready.max_model_len, ready.max_num_seqs) == (32, 8)
    assert [note.split()[0] for note in ready.notes] == ["max_model_len", "max_num_seqs"]
    ready = make_engine(FakeRunner(8, 4), max_model_len=None, max_num_seqs=8).ready
    assert ready.max_model_len == 32
    with pytest.raises(ValueError, match="cache_memory"):
        make_engine(FakeRunner(1, 1), max_model_len=None)


def test_a_tenants_share_of_the_cache_is_bounded():
    engine = make_engine(FakeRunner(64, 4), cache_memory=6400, tenant_cache_memory=500)
    for number in range(10):
        serve(engine, make_request(tenant="greedy", prompt=[number + 1] * 30))
    serve(engine, make_request(tenant="modest"))
    assert engine.stats.num_cached_blocks == 5 + 5  # 500 of 6400 bytes, and 17 tokens
