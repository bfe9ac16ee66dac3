"""A tokenizer of few tokens, each of one or two characters."""

from __future__ import annotations

EOS = 0
THINK_END = 1
TEXTS = ("", "</t>", *'{}[]",:ab01- ', "ab", '":', '"}', "01", ", ")


class LetterTokenizer:
    """Id 0 ends an answer, id 1 its reasoning; the others are TEXTS."""

    special_ids = frozenset({EOS, THINK_END})

    def vocabulary(self) -> list[bytes]:
        return [text.encode() for text in TEXTS]

    def encode(self, text: str, *, parse_special: bool, add_bos: bool) -> list[int]:
        ids = []
        while text:
            longest = max((t for t in TEXTS[2:] if text.startswith(t)), key=len)
            ids.append(TEXTS.index(longest))
            text = text[len(longest) :]
        return ids


def text_of(ids: tuple[int, ...]) -> str:
    return "".join(TEXTS[i] for i in ids)
