"""Texts of tokens that end an answer. Files often name one id; chat models end a turn with any of these."""

from __future__ import annotations

END_TEXTS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<\uff5cend▁of▁sentence\uff5c>",
)
