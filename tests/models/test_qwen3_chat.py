"""A Qwen3 folder with the official tokenizer and template, and tiny random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from jinn import LLM, SamplingParams
from jinn.engine.messages import ThinkingBudget
from server.real import RealServer
from text.official import official_folder

END_OF_TEXT, IM_END, THINK, END_THINK = 151643, 151645, 151667, 151668
GENERATION = {
    "eos_token_id": [IM_END, END_OF_TEXT],
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is <|im_end|>?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(official_folder("qwen3") / name, path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(GENERATION))
    return path


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, threads=1, cache_memory=2**20, max_model_len=512) as model:
        yield model


def test_the_config_says_where_answers_end_and_how_to_draw(llm):
    assert llm.ready.eos_token_ids == (IM_END, END_OF_TEXT)
    defaults = llm.default_sampling
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (0.6, 20, 0.95)


@pytest.mark.parametrize("end", [IM_END, END_OF_TEXT])
def test_an_answer_ends_at_either(llm, end):
    answer = llm.chat(CHAT, SamplingParams(temperature=0.0, max_tokens=8, logit_bias={end: 100.0}))
    assert answer.finish_reason == "stop"
    assert list(answer.token_ids) == [end]
    assert answer.text == ""


def test_an_answer_ends_nowhere_else(llm):
    bias = {IM_END: -100.0, END_OF_TEXT: -100.0}
    answer = llm.chat(CHAT, SamplingParams(temperature=0.0, max_tokens=8, logit_bias=bias))
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 8


@pytest.mark.parametrize("thinks", [True, False])
def test_prompts_are_those_of_transformers(llm, folder, thinks):
    chat = [{"role": "user", "content": "Where is Paris?"}]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, add_generation_prompt=True, enable_thinking=thinks, tokenize=True, return_dict=False
    )
    assert llm.encode_chat(chat, enable_thinking=thinks) == expected


def test_a_users_text_makes_no_control_token(llm):
    assert llm.encode_chat(CHAT).count(IM_END) == 2


@pytest.fixture(scope="module")
def server(folder):
    server = RealServer(str(folder), "--cache-memory", "1MiB", "--max-model-len", "512", "--threads", "1")
    yield server
    assert server.stop() == 0


def ask(server, **fields):
    body = {"messages": CHAT, "temperature": 0, "max_tokens": 12, "logit_bias": {str(THINK): 100}, **fields}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["message"], answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"]


def test_thoughts_end_with_their_budget(server):
    """A model that only ever says <think>, and is closed by the engine."""
    message, num_tokens = ask(server)
    assert (message["reasoning_content"], message["content"]) == ("<think>" * 11, None)
    assert num_tokens == 12
    message, num_tokens = ask(server, thinking_budget=3)
    assert (message["reasoning_content"], message["content"]) == ("<think>" * 3, "<think>" * 6)
    assert num_tokens == 1 + 3 + 2  # the opening tag, the thoughts, a line break and the closing tag
    message, num_tokens = ask(server, thinking_budget=0)
    assert ("reasoning_content" in message, message["content"]) == (False, "<think>" * 9)


def test_the_template_closes_thoughts_that_are_not_wanted(server):
    message, num_tokens = ask(server, enable_thinking=False, logit_bias={"9707": 100})
    assert (message["content"], num_tokens) == ("Hello" * 12, 0)


def test_a_forced_token_tells_the_models_log_probability(llm):
    """The same with and without a budget, where the model draws what is forced anyway."""
    prompt = llm.encode_chat(CHAT)
    bias = {END_THINK: 100.0}
    free = SamplingParams(temperature=0.0, max_tokens=1, logit_bias=bias, logprobs=2)
    forced = replace(free, logit_bias={}, thinking_budget=ThinkingBudget(0, None, END_THINK, (END_THINK,)))
    (drawn,), (closed,) = llm.generate([prompt], free), llm.generate([prompt], forced)
    assert closed.token_ids == drawn.token_ids == [END_THINK]
    assert closed.logprobs == drawn.logprobs
