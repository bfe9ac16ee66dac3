"""A Qwen3 folder with the official tokenizer and template, and tiny random weights, under `jinn.LLM`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from jinn import LLM, SamplingParams
from text.official import official_folder

END_OF_TEXT, IM_END = 151643, 151645
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
