"""Texts that are read and not continued."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from fake_runner import FakeRunner, make_engine

from jinn.engine.config import EngineConfig
from jinn.engine.engine import Engine
from jinn.engine.messages import Abort, Pooling, SamplingParams, Score, ScoreOutput, Submit
from tiny import tiny_llama_gguf, tiny_llama_tensors

TEXT = (5, 3, 9, 9, 2, 14, 7, 1, 22, 4, 6)


def scored(runner: FakeRunner, request: Score, **settings: object) -> ScoreOutput:
    engine = make_engine(runner, **settings)
    engine.score(request)
    outputs: list[ScoreOutput] = []
    for _ in range(100):
        if not engine.has_work:
            break
        outputs += engine.step().scores
        engine.check_integrity()
    (output,) = outputs
    assert engine.stats.num_used_blocks == 0
    return output


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_logprobs(chunk: int) -> None:
    """As the logits say, in whatever chunks the text is read."""
    output = scored(FakeRunner(16, 4), Score("r", TEXT, 2, None), max_num_batched_tokens=chunk)
    logits = make_engine(FakeRunner(16, 4)).logits(np.array(TEXT, np.int32)).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert output.error is None
    assert len(output.logprobs) == len(TEXT) - 1
    for row, (target, entry) in enumerate(zip(TEXT[1:], output.logprobs, strict=True)):
        assert math.isclose(entry.logprob, expected[row, target], abs_tol=1e-6)
        best = np.argsort(-expected[row], kind="stable")[:2]
        assert [token_id for token_id, _ in entry.top] == best.tolist()


def test_logprobs_of_one_token() -> None:
    assert scored(FakeRunner(16, 4), Score("r", (5,), 0, None)) == ScoreOutput("r")


@pytest.mark.parametrize("pooling", Pooling)
def test_embedding_is_the_same_in_any_chunks(pooling: Pooling) -> None:
    states = make_engine(FakeRunner(16, 4)).logits(np.array(TEXT, np.int32)).astype(np.float64)
    expected = states[-1] if pooling is Pooling.LAST else states.mean(axis=0)
    outputs = [
        scored(FakeRunner(16, 4), Score("r", TEXT, None, pooling), max_num_batched_tokens=chunk).embedding
        for chunk in (1, 3, 64)
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    np.testing.assert_allclose(outputs[0], expected, rtol=1e-12)


def test_generation_goes_on_beside_it() -> None:
    def generated(*requests: Score) -> list[int]:
        engine = make_engine(FakeRunner(32, 4), max_num_batched_tokens=4)
        for request in requests:
            engine.score(request)
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
        engine.submit(Submit("g", "tenant", (1, 2, 3), sampling))
        token_ids: list[int] = []
        while engine.has_work:
            token_ids += [i for output in engine.step().outputs for i in output.token_ids]
            engine.check_integrity()
        return token_ids

    assert generated() == generated(Score("a", TEXT, 1, None), Score("b", TEXT, None, Pooling.LAST))


def test_failures_are_answers() -> None:
    assert scored(FakeRunner(16, 4, broken_id=9), Score("r", TEXT, 1, None)).error
    assert scored(FakeRunner(16, 4, nan_id=9), Score("r", TEXT, 1, None)).error
    assert scored(FakeRunner(16, 4, nan_id=9), Score("r", TEXT, None, Pooling.MEAN)).error
    assert scored(FakeRunner(2, 4), Score("r", TEXT, 1, None)).error


def test_abort_frees_what_it_holds() -> None:
    engine = make_engine(FakeRunner(16, 4), max_num_batched_tokens=2)
    engine.score(Score("r", TEXT, 1, None))
    engine.step()
    assert engine.stats.num_used_blocks
    engine.abort(Abort("r"))
    engine.check_integrity()
    assert not engine.has_work
    assert engine.stats.num_used_blocks == 0


def test_native_runner(tmp_path: Path) -> None:
    """Log-probabilities have the bits that generation gives, and the head of the states gives the logits."""
    pytest.importorskip("jinn._native")
    from jinn.engine.loading import load_runner

    config = EngineConfig(model=str(tiny_llama_gguf(tmp_path / "tiny.gguf")), cache_memory=2**22)
    runner, info = load_runner(config, lambda done, total: None)
    engine = Engine(runner, info, config)
    prompt = (10, 20, 30)
    engine.submit(Submit("g", "t", prompt, SamplingParams(max_tokens=5, seed=3, logprobs=4, ignore_eos=True)))
    steps = [engine.step().outputs for _ in range(5)]
    generated = tuple(i for outputs in steps for output in outputs for i in output.token_ids)
    logprobs = tuple(entry for outputs in steps for output in outputs for entry in output.logprobs)
    engine.score(Score("s", prompt + generated, 4, None))
    (output,) = engine.step().scores
    assert output.logprobs[len(prompt) - 1 :] == logprobs

    engine.score(Score("e", prompt + generated, None, Pooling.LAST))
    (output,) = engine.step().scores
    weights = tiny_llama_tensors()["model.embed_tokens.weight"].astype(np.float64)
    logits = engine.logits(np.array(prompt + generated, np.int32))[-1]
    np.testing.assert_allclose(weights @ output.embedding, logits, atol=0.02)
    assert np.argmax(weights @ output.embedding) == np.argmax(logits)
