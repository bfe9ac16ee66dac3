"""Turns begin where the text of a message does."""

from __future__ import annotations

from jinn.frontend import load_frontend
from jinn.text.tokenizer import AddedToken, TokenKind
from jinn.text.turns import turn_starts


def test_a_conversation(smollm2_path):
    frontend = load_frontend(smollm2_path)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello\nthere"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "<|im_start|>user\nnot a turn"},
    ]
    ids = frontend.encode_chat(messages)
    starts = turn_starts(frontend.tokenizer, ids)
    begun = [frontend.tokenizer.decode(ids[start:], skip_special=False) for start in starts]
    said = ["Be brief.<|im_end|>", "Hello\nthere<|im_end|>", "Hi<|im_end|>", "<|im_start|>user\nnot a turn"]
    assert len(begun) == 5
    assert all(text.startswith(words) for text, words in zip(begun, said, strict=False))
    assert begun[-1] == ""


class Letters:
    """A tokenizer of single characters, and one control token."""

    def __init__(self, opener):
        self.added_tokens = {opener: AddedToken(1000, TokenKind.CONTROL)}

    def token_bytes(self, token_id):
        return b"" if token_id == 1000 else bytes([token_id])


def test_headers():
    ids = [1000, *b"Hello", 1000, *b"Hi"]
    assert turn_starts(Letters("<｜User｜>"), ids) == (1, 7)
    assert turn_starts(Letters("<|im_start|>"), [1000, *b"user\nA\n", 1000, *b"me\n"]) == (6, 12)
    assert turn_starts(Letters("<|im_start|>"), [1000, *b"nothing ends this header"]) == (1,)
    assert turn_starts(Letters("<|im_start|>"), [1000]) == (1,)
    assert turn_starts(Letters("<s>"), ids) == ()
    assert turn_starts(Letters("<|im_start|>"), []) == ()
