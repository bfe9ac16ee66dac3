"""Filling in the middle: a prompt and the text that is to follow the answer, in a model's own form."""

from __future__ import annotations

from jinn.text.tokenizer import Tokenizer

# What stands before the prefix, before the suffix, and after both: Qwen, StarCoder, DeepSeek.
_FORMS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)


def encode_infill(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """The ids that ask for what lies between two texts, whose own text never becomes a control token.

    Raises ValueError where the tokenizer has no tokens for it.
    """
    for form in _FORMS:
        if all(text in tokenizer.added_tokens for text in form):
            before, between, after = (tokenizer.added_tokens[text].id for text in form)
            ids = tokenizer.encode_spans([before, prefix, between, suffix, after])
            return tokenizer.encode("", parse_special=False) + ids  # the start of a text, if it has one
    raise ValueError("this model has no tokens for filling in the middle")
