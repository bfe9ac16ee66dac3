"""Tokenizers and templates from one file format to the other and back, as other libraries read them."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from jinn.text.presplit import PRESPLITS
from jinn.weights.errors import WeightsError
from jinn.weights.tokenizer_files import gguf_tokenizer, hf_tokenizer
from tiny import CHAT_TEMPLATE, MERGES, SPECIAL_TOKENS, byte_alphabet

TEXTS = (
    "the thin hint of it, isn't it? IT'S 12345 naïve cafe\u0301",
    "  two  spaces\n\n\tand lines\r\n 中文テスト ひらがな x1y22z333",
    "<|im_start|>user\nhi<think>no</think><|im_end|>",
)
ADDED = (*SPECIAL_TOKENS, "<think>", "</think>")
BOS = {"bos_token": "<|im_start|>"}
SIZE = 300


def write_folder(path, pre="qwen2", first=False, **config):
    """A tokenizer with a family's pre-split; added tokens stand before the words, or after."""
    words = [*byte_alphabet(), *(left + right for left, right in MERGES)]
    texts = [*ADDED, *words] if first else words
    presplit = PRESPLITS[pre]
    model = models.BPE(
        {text: i for i, text in enumerate(texts)}, list(MERGES), ignore_merges=presplit.ignore_merges
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(presplit.steps))
    if presplit.use_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(text, special="|" in text, normalized=False) for text in ADDED]
    tokenizer.add_special_tokens([token for token in tokens if token.special])
    tokenizer.add_tokens([token for token in tokens if not token.special])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        **config,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def write_back(path, metadata):
    path.mkdir()
    for name, content in hf_tokenizer(metadata).items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("pre", PRESPLITS)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_tokenizer_comes_back(tmp_path, pre, first):
    folder = write_folder(tmp_path / "one", pre, first, **BOS, add_bos_token=False)
    metadata = gguf_tokenizer(folder, SIZE)
    assert metadata["tokenizer.ggml.pre"] == pre
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == SIZE
    back = write_back(tmp_path / "two", metadata)
    before, after = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (folder, back))
    for text in TEXTS:
        assert after.encode(text).ids == before.encode(text).ids
    again = gguf_tokenizer(back, SIZE)
    assert again.keys() == metadata.keys()
    assert all(
        list(again[key]) == list(metadata[key])
        for key in metadata
        if not isinstance(metadata[key], bool | int)
    )
    assert all(again[key] == metadata[key] for key in metadata if isinstance(metadata[key], bool | int))


def test_transformers_reads_it(tmp_path):
    folder = write_folder(tmp_path / "one", **BOS, add_bos_token=True)
    back = write_back(tmp_path / "two", gguf_tokenizer(folder, SIZE))
    tokenizer = AutoTokenizer.from_pretrained(back)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert tokenizer("hint").input_ids == [
        tokenizer.bos_token_id,
        *tokenizer("hint", add_special_tokens=False).input_ids,
    ]
    messages = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
    assert tokenizer.decode(tokenizer("the <think>").input_ids, skip_special_tokens=True) == "the <think>"


def test_named_templates_come_back(tmp_path):
    templates = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    metadata = gguf_tokenizer(write_folder(tmp_path / "one", chat_template=templates), SIZE)
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert metadata["tokenizer.chat_template.tool_use"] == "tools"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert hf_tokenizer(metadata)["tokenizer_config.json"]["chat_template"] == templates


def test_a_template_in_a_file_of_its_own(tmp_path):
    folder = write_folder(tmp_path / "one", chat_template=None)
    (folder / "chat_template.jinja").write_text("own")
    assert gguf_tokenizer(folder, SIZE)["tokenizer.chat_template"] == "own"


def test_an_unknown_presplit_is_refused(tmp_path):
    folder = write_folder(tmp_path / "one")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"its pre_tokenizer is none of deepseek-v3, gpt-2, "):
        gguf_tokenizer(folder, SIZE)


def test_more_ids_than_rows_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="has 265 ids, but the model 264 rows"):
        gguf_tokenizer(write_folder(tmp_path / "one"), 264)
