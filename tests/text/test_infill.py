"""Filling in the middle, and what belongs after a text that is read whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from jinn.text.infill import encode_infill
from jinn.text.tokenizer import Tokenizer
from tiny import tiny_tokenizer

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
DEEPSEEK = ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>")


def saved(path: Path, added: tuple[str, ...] = (), last: str | None = None) -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    if last is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {last}", special_tokens=[(last, tokenizer.token_to_id(last))]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    return Tokenizer.from_folder(path)


@pytest.mark.parametrize("form", [QWEN, DEEPSEEK])
def test_form(tmp_path: Path, form: tuple[str, str, str]) -> None:
    tokenizer = saved(tmp_path, form)
    ids = encode_infill(tokenizer, "def f(", "):")
    assert tokenizer.decode(ids, skip_special=False) == f"{form[0]}def f({form[1]}):{form[2]}"


def test_text_cannot_end_the_prefix(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, QWEN)
    ids = encode_infill(tokenizer, f"a{QWEN[2]}", f"{QWEN[1]}b")
    assert [token_id for token_id in ids if token_id in tokenizer.special_ids] == [
        tokenizer.added_tokens[text].id for text in QWEN
    ]


def test_model_without_the_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="filling in the middle"):
        encode_infill(saved(tmp_path, QWEN[:2]), "a", "b")


def test_suffix_of_a_whole_text(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, last="<|im_end|>")
    assert tokenizer.suffix_ids == (tokenizer.added_tokens["<|im_end|>"].id,)
    assert tokenizer.encode("a")[-1:] != list(tokenizer.suffix_ids)
    assert saved(tmp_path).suffix_ids == ()
