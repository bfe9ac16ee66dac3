r"""How each tokenizer family splits text before merging, keyed by a GGUF's `tokenizer.ggml.pre`.

The patterns are those of the official tokenizer.json files, for the library's own regular expressions.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split


@dataclass(frozen=True, slots=True)
class Presplit:
    """The steps run in turn, each on the pieces that the one before it left."""

    steps: tuple[PreTokenizer, ...]
    use_nfc: bool = False
    ignore_merges: bool = False  # a piece that is itself in the vocabulary is one token
    add_bos: bool = False  # where the file does not say


def _isolate(*patterns: str) -> tuple[PreTokenizer, ...]:
    """Each match a piece of its own, then bytes as GPT-2's characters."""
    splits = [Split(Regex(pattern), "isolated") for pattern in patterns]
    return (*splits, ByteLevel(add_prefix_space=False, use_regex=False))


_GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)

# Filled in with: a run of letters, a run of digits, and what neither punctuation nor white space may be.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?%s+|%s| ?[^\s%s]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _WORDS % (r"\p{L}", r"\p{N}", r"\p{L}\p{N}")
_QWEN35 = _WORDS % (r"[\p{L}\p{M}]", r"\p{N}", r"\p{L}\p{M}\p{N}")
_LLAMA3 = _WORDS % (r"\p{L}", r"\p{N}{1,3}", r"\p{L}\p{N}")

_DEEPSEEK_CJK = r"[一-龥\x{3040}-ゟ\x{30A0}-ヿ]+"
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PRESPLITS = {
    "deepseek-v3": Presplit(_isolate(r"\p{N}{1,3}", _DEEPSEEK_CJK, _DEEPSEEK_WORDS)),
    "gpt-2": Presplit((_GPT2,)),
    "llama-bpe": Presplit(_isolate(_LLAMA3), ignore_merges=True, add_bos=True),
    "qwen2": Presplit(_isolate(_QWEN2), use_nfc=True),
    "qwen35": Presplit(_isolate(_QWEN35), use_nfc=True),
    "smollm": Presplit((Digits(individual_digits=True), _GPT2)),
}
