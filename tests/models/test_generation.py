"""Where answers end, and how a checkpoint would have them sampled."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jinn.models.fields import ConfigError
from jinn.models.generation import generation_defaults
from jinn.weights.checkpoint import Checkpoint, open_checkpoint
from tiny import tiny_llama_folder

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
QWEN3_TOKENS = ["a", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
QWEN3_GGUF = {
    "tokenizer.ggml.tokens": QWEN3_TOKENS,
    "tokenizer.ggml.token_type": [NORMAL, CONTROL, CONTROL, CONTROL, USER_DEFINED],
    "tokenizer.ggml.eos_token_id": 3,
}


def gguf_defaults(**changes):
    metadata = {**QWEN3_GGUF, **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}
    return generation_defaults(Checkpoint(None, "gguf", "qwen3", metadata, {}, None))


def folder_defaults(path, **generation_config):
    folder = tiny_llama_folder(path)
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    with open_checkpoint(folder) as checkpoint:
        return generation_defaults(checkpoint)


def test_gguf_ends_at_what_it_names_and_at_known_control_tokens():
    assert gguf_defaults().eos_token_ids == (3, 1)
    assert gguf_defaults(eos_token_id=1, eot_token_id=2).eos_token_ids == (1, 2, 3)
    assert gguf_defaults(token_type=[NORMAL] * 5).eos_token_ids == (3,)
    as_read = np.array(QWEN3_GGUF["tokenizer.ggml.token_type"], np.int32)
    assert gguf_defaults(token_type=as_read).eos_token_ids == (3, 1)
    assert gguf_defaults(token_type=[CONTROL] * 2).eos_token_ids == (3, 1)
    for lie in ([], 7, None, [1, 2], "<|im_end|>"):
        assert gguf_defaults(tokens=lie).eos_token_ids == (3,)
        assert gguf_defaults(token_type=lie).eos_token_ids == (3,)


def test_a_folder_ends_at_its_list(tmp_path):
    assert folder_defaults(tmp_path, eos_token_id=[151645, 151643]).eos_token_ids == (151645, 151643)
    assert folder_defaults(tmp_path, temperature=0.6).eos_token_ids == (2,)


def test_sampling_is_greedy_where_the_file_says_so(tmp_path):
    assert folder_defaults(tmp_path, do_sample=False, temperature=0.6).temperature == 0.0
    assert folder_defaults(tmp_path, do_sample=True, temperature=0.6, top_k=20).top_k == 20
    assert folder_defaults(tmp_path).temperature is None


@pytest.mark.parametrize("value", ["2", -1, True, 1.5])
def test_a_wrong_end_is_named(tmp_path, value):
    with pytest.raises(ConfigError, match="config field eos_token_id must be from 0"):
        folder_defaults(tmp_path, eos_token_id=value)


@pytest.mark.parametrize("value", ["hot", True, [1]])
def test_a_wrong_setting_is_named(tmp_path, value):
    with pytest.raises(ConfigError, match="generation field temperature must be a number"):
        folder_defaults(tmp_path, temperature=value)
