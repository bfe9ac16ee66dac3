"""Requests through adapters: each as if it were alone, whoever shares its batch or has read its prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jinn.engine.config import EngineConfig
from jinn.engine.engine import Engine
from jinn.engine.loading import load_runner
from jinn.engine.memory import Footprint, footprint
from jinn.engine.messages import FinishReason, Pooling, SamplingParams, Score, Submit
from jinn.engine.start import start_engine
from jinn.weights.lora import read_lora
from lora_folders import llama_linear_shapes, write_lora
from models.transformers_models import random_model
from same_bytes import answer_bytes
from tiny import tiny_llama_gguf

PROMPT = tuple(range(10, 60))
SAMPLING = SamplingParams(max_tokens=12, temperature=0.8, seed=1, logprobs=3, ignore_eos=True)
NAMES = (None, "first", "second")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A tiny llama with two adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes = llama_linear_shapes()
    first, second = (write_lora(folder / name, shapes, seed) for seed, name in enumerate(("first", "second")))
    return EngineConfig(
        str(tiny_llama_gguf(folder / "tiny.gguf", format_name="Q8_0")),
        num_threads=1,
        cache_memory=2**22,
        block_size=16,
        lora_adapters={"first": str(first), "second": str(second)},
    )


def start(config: EngineConfig) -> Engine:
    return start_engine(config, load_runner, lambda loaded, total: None)


def submit(adapter: str | None, request_id: str = "r") -> Submit:
    return Submit(request_id, "tenant", PROMPT, SAMPLING, adapter=adapter)


def answers(engine: Engine, *submits: Submit) -> dict[str, list]:
    """The outputs of requests that come at once, by id."""
    outputs = {request.request_id: [] for request in submits}
    for request in submits:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
        engine.check_integrity()
    return outputs


def test_the_engine_tells_what_it_has_loaded(config):
    ready = start(config).ready
    assert [name for name, _ in ready.adapters] == ["first", "second"]
    assert len({digest for _, digest in ready.adapters}) == 2
    bare = start(replace(config, lora_adapters={})).ready
    assert bare.system_fingerprint == ready.system_fingerprint
    assert bare.adapters == ()


def test_adapters_and_the_model_in_one_batch(config):
    """Each answer has the bytes of the request alone, and those of different adapters differ."""
    alone = [answer_bytes(answers(start(config), submit(name))["r"]) for name in NAMES]
    bare = answer_bytes(answers(start(replace(config, lora_adapters={})), submit(None))["r"])
    assert alone[0] == bare
    assert alone[0] != alone[1] != alone[2] != alone[0]
    engine = start(config)
    company = answers(engine, *(submit(NAMES[i % 3], f"r{i}") for i in range(9)))
    for i in range(9):
        assert answer_bytes(company[f"r{i}"]) == alone[i % 3]
    assert engine.stats.num_steps < 3 * SAMPLING.max_tokens


@pytest.mark.parametrize("variant", [None, "qwen3_next untied"])
def test_a_prompt_is_read_once_for_each_adapter(config, variant, tmp_path):
    """Keys, values and recurrent states of one adapter are of no use to another."""
    if variant is not None:
        random_model(variant).save_pretrained(tmp_path / "model")
        shapes = {"model.layers.0.linear_attn.in_proj_qkvz": (128, 64)}
        adapters = {name: str(write_lora(tmp_path / name, shapes, len(name))) for name in NAMES[1:]}
        config = replace(config, model=str(tmp_path / "model"), lora_adapters=adapters)
    engine = start(config)
    read = [answers(engine, submit(name))["r"] for name in (*NAMES, *NAMES)]
    assert [outputs[-1].num_cached_tokens for outputs in read] == [0] * 3 + [len(PROMPT) - 1] * 3
    for first, again in zip(read[:3], read[3:], strict=True):
        assert answer_bytes(first) == answer_bytes(again)
    assert answer_bytes(read[0]) != answer_bytes(read[1]) != answer_bytes(read[2])


def test_texts_are_read_through_adapters(config):
    engine = start(config)
    requests = [Score(f"l{name}", PROMPT, 2, None, name) for name in NAMES]
    requests += [Score(f"h{name}", PROMPT, None, Pooling.MEAN, name) for name in NAMES]
    for request in requests:
        engine.score(request)
    scores = {}
    while engine.has_work:
        scores |= {output.request_id: output for output in engine.step().scores}
    assert not any(output.error for output in scores.values())
    for kind in ("l", "h"):
        base, first, second = (scores[f"{kind}{name}"] for name in NAMES)
        assert base != replace(first, request_id=base.request_id)
        assert first != replace(second, request_id=first.request_id)
    generated = answers(engine, Submit("r", "t", PROMPT[:-1], SAMPLING, adapter="first"))["r"][0]
    read = dict(scores["lfirst"].logprobs[-1].top)
    assert {token_id: read.get(token_id) for token_id in dict(generated.logprobs[0].top[:2])} == dict(
        generated.logprobs[0].top[:2]
    )


def test_an_unknown_adapter_ends_the_request(config):
    engine = start(config)
    (output,) = answers(engine, submit("third"))["r"]
    assert output.finish_reason is FinishReason.ERROR
    assert output.error == "there is no adapter 'third'"
    engine.score(Score("s", PROMPT, 0, None, "third"))
    (score,) = engine.step().scores
    assert score.error == "there is no adapter 'third'"
    assert not engine.has_work


@pytest.mark.parametrize("speculative", ["ngram", "draft"])
def test_drafts_change_no_byte(config, speculative):
    """A draft model guesses as if there were no adapters."""
    draft_model = config.model if speculative == "draft" else None
    drafting = start(replace(config, speculative=speculative, draft_model=draft_model))
    for name in NAMES:
        expected = answers(start(config), submit(name))["r"]
        assert answer_bytes(answers(drafting, submit(name))["r"]) == answer_bytes(expected)
    if speculative == "draft":
        assert drafting.stats.num_accepted_tokens > 0


def test_the_plan_of_memory_counts_adapters(config):
    adapter = read_lora(config.lora_adapters["first"])
    assert adapter.nbytes > 0
    assert footprint([], [adapter, adapter]) == Footprint(2 * adapter.nbytes, 0, 0)


@pytest.mark.parametrize("adapters", [{"": "path"}, {"name": ""}, {"n" * 257: "path"}, {"name": 1}])
def test_adapters_have_names_and_paths(adapters):
    with pytest.raises(ValueError, match="lora_adapters must be paths by names of 1 to 256 characters"):
        EngineConfig("model", lora_adapters=adapters)


def test_the_config_survives_its_way_to_the_process(config):
    assert EngineConfig.from_json(config.to_json()) == config


def test_one_adapters_sequences_lie_side_by_side(config, monkeypatch):
    engine = start(config)
    batches, step = [], engine._runner.step

    def watched(batch, rows):
        batches.append(batch)
        return step(batch, rows)

    monkeypatch.setattr(engine._runner, "step", watched)
    answers(engine, *(submit(NAMES[i % 3], f"r{i}") for i in range(9)))
    assert any(len(batch.adapters) == 9 for batch in batches)
    for batch in batches:
        np.testing.assert_array_equal(batch.adapters, np.sort(batch.adapters))
