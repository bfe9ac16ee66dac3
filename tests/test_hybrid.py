"""Prefix reuse and speculation of every family on the native kernels: less work, and the same bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random

import pytest

from jinn.engine.config import EngineConfig
from jinn.engine.engine import Engine
from jinn.engine.loading import load_runner
from jinn.engine.messages import SamplingParams, Submit
from jinn.engine.start import start_engine
from models.gguf_models import gguf_of
from models.test_prediction import VARIANTS, add_tensors, prediction_module, prediction_tensors
from models.transformers_models import random_model
from same_bytes import BLOCK_SIZE, SmallerCache, answer_bytes

FAMILIES = ("llama", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "deepseek_v3")
HYBRIDS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
VOCAB_SIZE = 512
NUM_PROMPTS = 500  # of a family; CI runs one in ten


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A function from a family to a GGUF file of a tiny random model, in a block format."""
    folder = tmp_path_factory.mktemp("hybrid")

    @cache
    def save(family):
        saved = folder / family
        random_model(f"{family} for llama.cpp").save_pretrained(saved)
        return str(gguf_of(saved, folder / f"{family}.gguf", "Q8_0"))

    return save


def config_of(path, **settings):
    return EngineConfig(
        path, num_threads=1, cache_memory=64 * 2**20, block_size=BLOCK_SIZE, max_model_len=4096, **settings
    )


def start(path, **settings):
    return start_engine(config_of(path, **settings), load_runner, lambda loaded, total: None)


def serve(engine, *submits):
    """Run until all have ended; the outputs of each."""
    outputs = {submit.request_id: [] for submit in submits}
    for submit in submits:
        engine.submit(submit)
    while engine.has_work:
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return [outputs[submit.request_id] for submit in submits]


def ids_of(outputs):
    return tuple(token_id for output in outputs for token_id in output.token_ids)


def random_ids(rng, count):
    return tuple(rng.randrange(VOCAB_SIZE) for _ in range(count))


def sampling_of(seed, **more):
    return SamplingParams(
        **{"seed": seed, "max_tokens": 12, "temperature": 0.8, "logprobs": 2, "ignore_eos": True, **more}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_each_turn_computes_only_what_is_new(paths, family):
    rng, engine, cold = Random(1), start(paths(family)), start(paths(family))
    prompt, known = random_ids(rng, 40), 0
    for turn in range(8):
        before = engine.stats
        request = Submit(f"turn {turn}", "me", prompt, sampling_of(turn))
        (outputs,) = serve(engine, request)
        assert outputs[0].num_cached_tokens == known
        assert engine.stats.num_prompt_tokens - before.num_prompt_tokens == len(prompt) - known
        assert engine.stats.num_cached_tokens - before.num_cached_tokens == known
        (alone,) = serve(cold, replace(request, tenant=f"stranger {turn}"))
        assert alone[0].num_cached_tokens == 0
        assert answer_bytes(outputs) == answer_bytes(alone)
        known = len(prompt) + len(ids_of(outputs)) - 1
        prompt = prompt + ids_of(outputs) + random_ids(rng, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_request_computes_what_follows_the_system_prompt(paths, family):
    rng, engine, cold = Random(2), start(paths(family)), start(paths(family))
    system = random_ids(rng, 70)
    for number in range(3):
        prompt = (*system, number, *random_ids(rng, 10))  # what follows differs from its first token on
        request = Submit(f"r{number}", "me", prompt, sampling_of(number), turn_starts=(3, 70))
        (outputs,) = serve(engine, request)
        assert outputs[0].num_cached_tokens == (70 if number else 0)
        assert answer_bytes(outputs) == answer_bytes(*serve(cold, replace(request, tenant=f"s{number}")))


@pytest.mark.parametrize("family", HYBRIDS)
def test_where_prompts_part_is_learned(paths, family):
    """Nothing says where turns start: the second request finds out, and the third goes on from there."""
    rng, engine = Random(3), start(paths(family))
    shared = random_ids(rng, 100)
    found = []
    for number in range(3):
        prompt = (*shared, number, *random_ids(rng, 20))
        (outputs,) = serve(engine, Submit(f"r{number}", "me", prompt, sampling_of(number)))
        found.append(outputs[0].num_cached_tokens)
    assert found == [0, 0, 100]


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_same_prompt_again_computes_its_last_token(paths, family):
    engine = start(paths(family))
    request = Submit("r", "me", random_ids(Random(4), 50), sampling_of(4, n=1))
    answers = [serve(engine, request)[0] for _ in range(3)]
    assert [outputs[0].num_cached_tokens for outputs in answers] == [0, 49, 49]
    assert answer_bytes(answers[0]) == answer_bytes(answers[1]) == answer_bytes(answers[2])


def check_starved(path, num_requests):
    """Requests that go on from parts of earlier ones, a few at a time, with slots for few snapshots.

    The engine that runs each alone has a small cache too: its books are checked in every step.
    """
    rng, cold, starved = Random(5), start_small(path), start_small(path)
    prompts = [random_ids(rng, 30)]
    for first in range(0, num_requests, 4):
        submits = []
        for number in range(first, first + rng.randint(1, 4)):
            kept = rng.choice(prompts)[:300]
            kept = kept[: rng.choice([rng.randint(1, len(kept)), len(kept)])]
            prompt = kept + random_ids(rng, rng.randint(1, 20))
            starts = (rng.randint(0, len(prompt)),)
            request = Submit(f"r{number}", rng.choice("ab"), prompt, sampling_of(number, max_tokens=5))
            submits.append(replace(request, turn_starts=starts))
        for request, outputs in zip(submits, serve(starved, *submits), strict=True):
            (alone,) = serve(cold, replace(request, tenant=request.request_id))
            assert alone[0].num_cached_tokens == 0
            assert answer_bytes(outputs) == answer_bytes(alone)
            prompts = [*prompts[-6:], request.prompt_ids, request.prompt_ids + ids_of(outputs)]
    assert starved.stats.num_used_blocks == 0
    assert starved.stats.num_cached_tokens > num_requests


def start_small(path):
    """An engine with 40 blocks and 7 state slots."""
    config = config_of(path)
    runner, info = load_runner(config, lambda loaded, total: None)
    return Engine(SmallerCache(runner, 40, num_state_slots=7), info, replace(config, max_model_len=600))


@pytest.mark.parametrize("family", HYBRIDS)
def test_few_slots_cost_reuse_and_nothing_else(paths, family):
    check_starved(paths(family), 60)


@pytest.mark.soak
def test_few_slots_at_length(paths):
    check_starved(paths("qwen3_next"), 10_000)


class PlantedDrafter:
    """Knows every answer, and gives so many right drafts, then wrong ones, as a random number says."""

    def __init__(self, answers, count):
        self.answers, self.count, self.rng = answers, count, Random(0)

    def draft(self, chunks):
        for chunk in chunks:
            sequence = chunk.sequence
            said, truth = len(sequence.output_ids), self.answers[sequence.request_id]
            num_right = self.rng.randint(0, self.count)
            drafts = truth[said : said + self.count]
            wrong = tuple((token_id + 1) % VOCAB_SIZE for token_id in drafts[num_right:])
            sequence.drafts = drafts[:num_right] + wrong

    def forget(self, sequence):
        sequence.drafts = ()


def random_submits(num_prompts):
    """Greedy and sampled, with prompts that share prefixes, so that drafts meet every kind of step."""
    rng = Random(6)
    prefixes = [random_ids(rng, 40) for _ in range(5)]
    for number in range(num_prompts):
        prompt = rng.choice(prefixes)[: rng.randint(0, 40)] + random_ids(rng, rng.randint(1, 10))
        more = {
            "temperature": rng.choice([0.0, 0.8, 1.5]),
            "top_p": rng.choice([1.0, 0.9]),
            "repetition_penalty": rng.choice([1.0, 1.2]),
            "frequency_penalty": rng.choice([0.0, 0.5]),
            "max_tokens": rng.randint(1, 12),
        }
        yield Submit(f"r{number}", "me", prompt, sampling_of(number, **more))


def check_planted_drafts(path, num_prompts):
    submits = list(random_submits(num_prompts))
    plain = start(path)
    expected = {s.request_id: serve(plain, s)[0] for s in submits}
    drafter = PlantedDrafter({name: ids_of(outputs) for name, outputs in expected.items()}, 4)
    engine = start(path, speculative="ngram")
    engine._drafter = drafter
    accepted = set()
    for first in range(0, num_prompts, 10):
        group = submits[first : first + 10]
        for submit, outputs in zip(group, serve(engine, *group), strict=True):
            assert answer_bytes(outputs) == answer_bytes(expected[submit.request_id])
            accepted |= {output.num_accepted_tokens for output in outputs}
    assert accepted == set(range(5))
    assert 0 < engine.stats.num_accepted_tokens < engine.stats.num_draft_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_no_byte(paths, family):
    check_planted_drafts(paths(family), NUM_PROMPTS // 10)


@pytest.mark.soak
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_no_byte_at_length(paths, family):
    check_planted_drafts(paths(family), NUM_PROMPTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_own_drafts(variant, tmp_path):
    path = tmp_path / "model"
    random_model(variant).save_pretrained(path)
    add_tensors(path, prediction_tensors(variant, prediction_module(variant, path)))
    rng = Random(7)
    submits = [
        Submit(f"r{i}", "me", tuple(rng.randrange(96) for _ in range(20 + i)), sampling_of(i, temperature=t))
        for i, t in enumerate([0.0, 0.8, 0.0, 1.5])
    ]
    plain, drafting = start(str(path)), start(str(path), speculative="mtp", num_speculative_tokens=3)
    for first, second in zip(serve(plain, *submits), serve(drafting, *submits), strict=True):
        assert answer_bytes(first) == answer_bytes(second)
    assert drafting.stats.num_draft_tokens > 50


def test_a_smaller_models_drafts(paths):
    path = paths("llama")
    submits = list(random_submits(12))
    plain = start(path)
    engine = start(path, speculative="draft", draft_model=path)
    for submit, outputs in zip(submits, serve(engine, *submits), strict=True):
        assert answer_bytes(outputs) == answer_bytes(*serve(plain, replace(submit, tenant="other")))
    assert engine.stats.num_accepted_tokens == engine.stats.num_draft_tokens > 20, "the same model is right"


def test_drafting_that_cannot_be_is_refused(paths, tmp_path):
    with pytest.raises(ValueError, match="recurrent states"):
        start(paths("llama"), speculative="draft", draft_model=paths("qwen3_next"))
    random_model("llama untied").save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="vocabulary of 96"):
        start(paths("llama"), speculative="draft", draft_model=str(tmp_path / "small"))
    with pytest.raises(ValueError, match="multi-token prediction"):
        start(paths("llama"), speculative="mtp")
