"""A byte-level BPE tokenizer that was never trained, with a family's vocabulary size and control tokens.

Its merges make words of two, three and four small letters, so that text becomes some tokens per word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from itertools import islice, product
from string import ascii_lowercase

import numpy as np

from jinn.text.tokenizer import BYTE_OF_CHAR
from jinn.weights.errors import WeightsError
from jinn.weights.gguf import MetadataValue

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a family's tokenizer has: `num_first` ids before the bytes, then words up to `num_normal` in all.

    `added` tokens have the ids that published ones have; those between them are unused.
    """

    presplit: str
    template: str
    num_first: int
    num_normal: int
    added: Mapping[int, str]
    bos: int | None
    eos: int
    pad: int


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_ADDED = (
    *_CHATML,
    *(f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    *(f"<|fim_{name}|>" for name in ("prefix", "middle", "suffix", "pad")),
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_DEEPSEEK_ADDED = {
    0: "<\uff5cbegin▁of▁sentence\uff5c>",
    1: "<\uff5cend▁of▁sentence\uff5c>",
    2: "<\uff5c▁pad▁\uff5c>",
    128798: "<think>",
    128799: "</think>",
    128803: "<\uff5cUser\uff5c>",
    128804: "<\uff5cAssistant\uff5c>",
}


def _qwen(presplit: str, first_added: int, bos: int | None) -> Vocabulary:
    added = dict(enumerate(_QWEN_ADDED, first_added))
    return Vocabulary(presplit, "qwen3", 0, first_added, added, bos, first_added + 2, first_added)


VOCABULARIES = {
    "llama": Vocabulary("smollm", "chatml", 3, 1 << 31, dict(enumerate(_CHATML)), 1, 2, 2),
    "qwen3": _qwen("qwen2", 151643, 151643),
    "qwen3_moe": _qwen("qwen2", 151643, 151643),
    "qwen3_next": _qwen("qwen2", 151643, 151643),
    "qwen3_5": _qwen("qwen35", 248044, None),
    "deepseek_v3": Vocabulary("deepseek-v3", "deepseek", 3, 128000, _DEEPSEEK_ADDED, 0, 1, 2),
}


def synthetic_tokenizer(family: str, vocab_size: int) -> dict[str, MetadataValue]:
    """GGUF's `tokenizer.*` metadata with `vocab_size` ids. Raises WeightsError for an unknown family."""
    if family not in VOCABULARIES:
        raise WeightsError(f"no tokenizer is known for family {family!r}")
    vocabulary = _fitted(VOCABULARIES[family], vocab_size)
    tokens = [f"[PAD{token_id}]" for token_id in range(vocab_size)]
    types = np.full(vocab_size, _UNUSED, np.int32)
    num_normal = min(vocabulary.num_normal, vocab_size)
    normal, merges = _words(num_normal - vocabulary.num_first)
    tokens[vocabulary.num_first : num_normal] = normal
    types[vocabulary.num_first : num_normal] = _NORMAL
    for token_id, text in vocabulary.added.items():
        tokens[token_id] = text
        types[token_id] = _CONTROL if text.startswith(("<|", "<\uff5c")) else _USER_DEFINED
    template = resources.files("jinn.weights") / "templates" / f"{vocabulary.template}.jinja"
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": vocabulary.presplit,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": vocabulary.eos,
        "tokenizer.ggml.padding_token_id": vocabulary.pad,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template.read_text(encoding="utf-8"),
    }
    if vocabulary.bos is not None:
        metadata["tokenizer.ggml.bos_token_id"] = vocabulary.bos
    return metadata


def _fitted(vocabulary: Vocabulary, vocab_size: int) -> Vocabulary:
    """The vocabulary, or for fewer ids one with fewer words, before the added tokens at its end."""
    if max(vocabulary.added) < vocab_size:
        return vocabulary
    last = [token_id for token_id in vocabulary.added if token_id >= vocabulary.num_first]
    moved = dict(zip(last, range(vocab_size - len(last), vocab_size), strict=True))
    return replace(
        vocabulary,
        num_normal=vocab_size - len(last),
        added={moved.get(token_id, token_id): text for token_id, text in vocabulary.added.items()},
        bos=None if vocabulary.bos is None else moved.get(vocabulary.bos, vocabulary.bos),
        eos=moved.get(vocabulary.eos, vocabulary.eos),
        pad=moved.get(vocabulary.pad, vocabulary.pad),
    )


def _words(count: int) -> tuple[list[str], list[str]]:
    """The bytes, and as many merged tokens as it takes for `count`; and the merges."""
    merges = list(islice(_merges(), count - len(BYTE_OF_CHAR)))
    return [*BYTE_OF_CHAR, *(left + right for left, right in merges)], [" ".join(merge) for merge in merges]


def _merges() -> Iterator[tuple[str, str]]:
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from product(pairs, ascii_lowercase)
    yield from product(pairs, pairs)
