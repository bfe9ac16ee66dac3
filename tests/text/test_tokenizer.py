from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
import unicodedata
from pathlib import Path

import numpy as np
import official
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jinn.text.tokenizer import Tokenizer, TokenKind

FAMILIES = ("qwen3", "deepseek")
COUNTS = [10_000, pytest.param(100_000, marks=pytest.mark.soak)]


def official_library(name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(official.official_folder(name) / "tokenizer.json"))


def random_texts(count: int, added: list[str], seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [official.random_text(rng, added) for _ in range(count)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_the_official_tokenizer(name: str, count: int) -> None:
    from_gguf, from_folder = official.converted(name), official.official(name)
    texts = random_texts(count, list(from_folder.added_tokens))
    expected = official_library(name).encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, expected, strict=True):
        assert from_folder.encode(text, add_bos=False) == encoding.ids, repr(text)
        assert from_gguf.encode(text, add_bos=False) == encoding.ids, repr(text)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_gives_the_normalised_text_back(name: str) -> None:
    tokenizer, normalizer = official.official(name), official_library(name).normalizer
    for text in random_texts(2_000, list(tokenizer.added_tokens), seed=1):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False).removeprefix(
            official.DEEPSEEK_BOS * tokenizer.add_bos
        ) == normalizer.normalize_str(text)


def test_smollm2_decodes_to_the_text_but_for_the_bytes_that_its_vocabulary_lacks() -> None:
    tokenizer = official.smollm2()
    for text in random_texts(2_000, list(tokenizer.added_tokens)):
        if not official.LOSSY.search(text):
            assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@pytest.mark.parametrize("count", COUNTS)
def test_smollm2_ids_are_those_of_llama_cpp(count: int, tmp_path: Path) -> None:
    tool = shutil.which("llama-tokenize")
    if tool is None:
        pytest.skip("llama-tokenize is not on PATH")
    tokenizer = official.smollm2()
    separator = "<empty_output>"
    added = [text for text in tokenizer.added_tokens if text != separator]
    # The two know different versions of Unicode, so no code point may be new to either.
    texts = [
        "".join(c for c in text if unicodedata.category(c) != "Cn") for text in random_texts(count, added)
    ]
    file = tmp_path / "texts"
    command = [tool, "-m", official.smollm2_path(), "-f", file, "--ids", "--no-bos", "--no-escape"]
    for start in range(0, count, 10_000):  # one run reads many texts, kept apart by a control token
        file.write_bytes(separator.join(texts[start : start + 10_000]).encode())
        output = subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603
        ids = json.loads(output[output.rindex(b"[") :])
        assert tokenizer.encode(file.read_bytes().decode()) == ids


def test_smollm2_splits_like_its_official_files() -> None:
    metadata = official.smollm2_metadata()
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    plain = tokenizers.Tokenizer(
        models.BPE({text: i for i, text in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges])
    )
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    plain.add_special_tokens(tokens[:17])
    tokenizer = official.smollm2()
    for text in random_texts(5_000, tokens[:17]):
        if not official.LOSSY.search(text):
            assert tokenizer.encode(text) == plain.encode(text).ids


@pytest.mark.parametrize("name", FAMILIES)
def test_properties_agree_between_gguf_and_folder(name: str) -> None:
    from_gguf, from_folder = official.converted(name), official.official(name)
    assert from_gguf.added_tokens == from_folder.added_tokens
    assert from_gguf.special_ids == from_folder.special_ids
    assert from_gguf.eos_token_ids == from_folder.eos_token_ids
    assert (from_gguf.bos_token_id, from_gguf.add_bos) == (from_folder.bos_token_id, from_folder.add_bos)
    assert from_gguf.vocab_size == from_folder.vocab_size + 9
    for token_id in range(from_folder.vocab_size):
        assert from_gguf.token_bytes(token_id) == from_folder.token_bytes(token_id)
    for tokenizer in (from_gguf, from_folder):
        assert tokenizer.vocabulary() == [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]


def test_smollm2_properties() -> None:
    tokenizer = official.smollm2()
    assert tokenizer.vocab_size == 49152
    assert tokenizer.bos_token_id == 1
    assert not tokenizer.add_bos
    assert tokenizer.eos_token_ids == (2, 0)  # <|im_end|>, which the file names, then <|endoftext|>
    assert tokenizer.special_ids == frozenset(range(17))


def test_qwen3_kinds() -> None:
    added = official.official("qwen3").added_tokens
    user_defined = {text for text, token in added.items() if token.kind is TokenKind.USER_DEFINED}
    assert user_defined == {
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    }


def test_a_token_of_control_form_is_control_whatever_its_flag() -> None:
    assert official.official("deepseek").added_tokens["<\uff5cUser\uff5c>"].kind is TokenKind.CONTROL


def test_nothing_merges_across_a_byte_without_a_token() -> None:
    tokenizer = official.smollm2()
    assert tokenizer.encode("_'") == [39710]
    assert tokenizer.encode("_\x16'") == [*tokenizer.encode("_"), *tokenizer.encode("'")]


def test_added_tokens_are_text_unless_parsed() -> None:
    tokenizer = official.smollm2()
    assert tokenizer.encode("a<|im_end|>") == [*tokenizer.encode("a"), 2]
    ids = tokenizer.encode("a<|im_end|>", parse_special=False)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == "a<|im_end|>"
    assert tokenizer.decode([*ids, 2, 1]) == "a<|im_end|>"
    assert tokenizer.decode([*ids, 2], skip_special=False) == "a<|im_end|><|im_end|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_added_token_is_text_where_none_is_parsed(name: str) -> None:
    tokenizer = official.official(name)
    added_ids = {token.id for token in tokenizer.added_tokens.values()}
    for text in tokenizer.added_tokens:
        ids = tokenizer.encode(f"{text}{text}", parse_special=False, add_bos=False)
        assert not added_ids & set(ids)
        assert tokenizer.decode(ids) == text * 2


def test_bos_is_added_where_the_file_says_and_where_asked() -> None:
    tokenizer = official.official("deepseek")
    assert tokenizer.encode("a")[0] == 0
    assert tokenizer.encode("") == [0]
    assert 0 not in tokenizer.encode("a", add_bos=False)
    assert official.smollm2().encode("a", add_bos=True)[0] == 1
    assert official.official("qwen3").encode("a", add_bos=True) == [64]  # it has none


@pytest.mark.parametrize("token_id", [-1, 49152, 10**9, 2**70])
def test_an_id_beyond_the_vocabulary_has_no_text(token_id: int) -> None:
    tokenizer = official.smollm2()
    assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([19556, token_id]) == "Hello"


def test_padding_ids_have_no_text_and_no_text_has_them() -> None:
    tokenizer = official.converted("qwen3")
    last = tokenizer.vocab_size - 1
    assert tokenizer.token_bytes(last) == b""
    assert last not in tokenizer.encode(f"[PAD{last}]")


@given(st.lists(st.integers(-5, 49200), max_size=40), st.booleans())
def test_decode_takes_any_ids(ids: list[int], skip_special: bool) -> None:
    tokenizer = official.smollm2()
    expected = b"".join(
        tokenizer.token_bytes(i) for i in ids if not (skip_special and i in tokenizer.special_ids)
    )
    assert tokenizer.decode(ids, skip_special=skip_special) == expected.decode("utf-8", "replace")


def test_decode_is_the_library_s_own_on_random_ids() -> None:
    tokenizer, library = official.official("qwen3"), official_library("qwen3")
    rng = random.Random(2)
    for _ in range(2_000):
        ids = [rng.choice((rng.randrange(256), rng.randrange(151_669))) for _ in range(rng.randint(0, 20))]
        assert tokenizer.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)


def test_a_lone_surrogate_is_named() -> None:
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D800\) at position 2"):
        official.smollm2().encode("ab\ud800")


MINIMAL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "abb", "<s>", "<s>x"],
    "tokenizer.ggml.token_type": np.array([1, 1, 1, 1, 3, 4], np.int32),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 4,
}


def test_llama_bpe_takes_a_piece_of_the_vocabulary_whole_and_adds_bos() -> None:
    tokenizer = Tokenizer.from_gguf(MINIMAL)
    assert tokenizer.encode("abb") == [4, 3]
    assert Tokenizer.from_gguf(MINIMAL | {"tokenizer.ggml.pre": "gpt-2"}).encode("abb") == [2, 1]


def test_the_longest_added_token_wins() -> None:
    assert Tokenizer.from_gguf(MINIMAL).encode("<s>x<s>a", add_bos=False) == [5, 4, 0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama' is not supported; supported: gpt2"),
        (
            {"tokenizer.ggml.pre": "tekken"},
            "'tekken' is not supported; supported: deepseek-v3, gpt-2, llama-bpe",
        ),
        ({"tokenizer.ggml.merges": ["ab"]}, "merges holds an entry that is not two tokens"),
        ({"tokenizer.ggml.merges": ["a z"]}, "merges do not fit tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type has 1 entries for 6 tokens"),
        ({"tokenizer.ggml.bos_token_id": 6}, "special token id 6 is not below the vocabulary's 6"),
        ({"tokenizer.ggml.eos_token_id": -1}, "special token id -1 is not"),
    ],
)
def test_bad_metadata_is_one_line(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        Tokenizer.from_gguf(MINIMAL | change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "merges"])
def test_a_missing_key_is_named(key: str) -> None:
    metadata = {name: value for name, value in MINIMAL.items() if name != f"tokenizer.ggml.{key}"}
    with pytest.raises(ValueError, match=f"the GGUF has no tokenizer.ggml.{key}"):
        Tokenizer.from_gguf(metadata)


def write_folder(
    folder: Path, library: tokenizers.Tokenizer, config: dict[str, object] | None = None
) -> Path:
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


def tiny_library(**bpe: object) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], **bpe))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_with_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    library = tiny_library()
    library.decoder = decoders.WordPiece()
    with pytest.raises(
        ValueError, match="decoder WordPiece is not supported; supported: model BPE, decoder ByteLevel"
    ):
        Tokenizer.from_folder(write_folder(tmp_path, library))


def test_a_broken_tokenizer_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json could not be read"):
        Tokenizer.from_folder(tmp_path)


def test_added_tokens_that_take_white_space_are_refused(tmp_path: Path) -> None:
    library = tiny_library()
    library.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
    with pytest.raises(ValueError, match="of '<x>' are not supported"):
        Tokenizer.from_folder(write_folder(tmp_path, library))


def test_a_control_token_that_plain_text_reaches_is_refused(tmp_path: Path) -> None:
    library = tiny_library()
    library.add_special_tokens(["ab"])
    with pytest.raises(ValueError, match="plain text can become the control token 'ab'"):
        Tokenizer.from_folder(write_folder(tmp_path, library))


def test_end_ids_come_from_generation_config_too(tmp_path: Path) -> None:
    library = tiny_library()
    library.add_special_tokens(["<x>", "<y>"])
    folder = write_folder(tmp_path, library, {"eos_token": {"content": "<y>"}, "bos_token": "<x>"})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == (4, 3)
    assert (tokenizer.bos_token_id, tokenizer.add_bos) == (3, False)


HALF_MEGABYTE = 500_000


@pytest.mark.parametrize(
    "unit",
    [
        " ",
        "a",
        "\n",
        " \n",
        "1",
        "!",
        "\u0301",
        "<",
        "漢",
        "'",
        "<|im_",
        "<\uff5cplace▁holder▁no▁",
        "a\u0301\u0323",
    ],
)
@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_long_runs_take_linear_time(name: str, unit: str) -> None:
    tokenizer = official.smollm2() if name == "smollm2" else official.official(name)
    text = unit * (HALF_MEGABYTE // len(unit.encode()))
    start = time.perf_counter()
    tokenizer.encode(text)
    assert time.perf_counter() - start < 5  # about 0.3 s; a quadratic scan takes minutes
