"""Byte-level BPE tokenizers, built from a GGUF's metadata or read from a Hugging Face folder.

The pre-split and the merges run in the `tokenizers` library, in an encoder that knows no added tokens. Added
tokens (`<|im_end|>`, `<think>`) are found here, so that the caller decides which text may become one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from jinn.text.endings import END_TEXTS
from jinn.text.presplit import PRESPLITS, Presplit


class TokenKind(StrEnum):
    """What an added token is for."""

    CONTROL = "control"  # structure: ends a turn, opens an image; never shown
    USER_DEFINED = "user-defined"  # part of the text: <think>, <tool_call>


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched as text, before the pre-split."""

    id: int
    kind: TokenKind


# `tokenizer.ggml.token_type`
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# Files flag some control tokens as plain text; their form tells.
_CONTROL_FORM = re.compile("<[|\uff5c].*[|\uff5c]>", re.DOTALL)


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: one more than the largest id in the file; a model may have rows beyond, without text.
        added_tokens: text to id and kind.
        special_ids: the ids of the control tokens.
        bos_token_id: None where the file names none.
        eos_token_ids: each of them ends a sequence; the first is the one that the file names, if any.
        add_bos: whether `encode` puts `bos_token_id` first unless told.
        suffix_ids: what belongs after a text that is read whole, as for an embedding; `encode` leaves it out.
    """

    def __init__(
        self,
        encoder: tokenizers.Tokenizer,
        *,
        lossy_bytes: bytes = b"",
        vocab_size: int,
        added_tokens: Mapping[str, AddedToken],
        bos_token_id: int | None,
        eos_token_ids: Iterable[int],
        add_bos: bool,
        suffix_ids: Iterable[int] = (),
    ) -> None:
        self._encoder = encoder
        self._lossy_bytes = lossy_bytes
        self._lossy_encoder = _lossy_encoder(encoder, lossy_bytes) if lossy_bytes else encoder
        self.vocab_size = vocab_size
        self.added_tokens = added_tokens
        self.special_ids = frozenset(t.id for t in added_tokens.values() if t.kind is TokenKind.CONTROL)
        self.bos_token_id = bos_token_id
        end_ids = (token.id for text, token in added_tokens.items() if text in END_TEXTS)
        self.eos_token_ids = tuple(dict.fromkeys((*eos_token_ids, *end_ids)))
        self.add_bos = add_bos and bos_token_id is not None
        self.suffix_ids = tuple(suffix_ids)
        self._added_bytes = {token.id: text.encode() for text, token in added_tokens.items()}
        self._added_pattern = re.compile(match_any(added_tokens))
        for token_id in (
            *self.eos_token_ids,
            *self.suffix_ids,
            *([] if bos_token_id is None else [bos_token_id]),
        ):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"special token id {token_id} is not below the vocabulary's {vocab_size}")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from the `tokenizer.ggml.*` keys of a GGUF.

        Raises ValueError naming the key, and what is supported where the kind of tokenizer is not.
        """
        presplit = _gguf_presplit(metadata)
        tokens: Sequence[str] = _required(metadata, "tokenizer.ggml.tokens")
        kinds = _token_kinds(metadata, len(tokens))
        vocab = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _NORMAL}
        added = {
            text: AddedToken(token_id, _kind(text, is_control=kind == _CONTROL))
            for token_id, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (_CONTROL, _USER_DEFINED) and text
        }
        bpe = _build_bpe(vocab, _required(metadata, "tokenizer.ggml.merges"), presplit)
        normalizer = normalizers.NFC() if presplit.use_nfc else None
        eos_keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        eos_ids = [i for key in eos_keys if (i := metadata.get(f"tokenizer.ggml.{key}")) is not None]
        return cls(
            _build_encoder(bpe, pre_tokenizers.Sequence(list(presplit.steps)), normalizer),
            lossy_bytes=bytes(byte for char, byte in BYTE_OF_CHAR.items() if char not in vocab),
            vocab_size=len(tokens),
            added_tokens=added,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=eos_ids,
            add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", presplit.add_bos)),
            suffix_ids=[i for i in eos_ids[:1] if metadata.get("tokenizer.ggml.add_eos_token")],
        )

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, and where they exist tokenizer_config.json and generation_config.json.

        Raises FileNotFoundError without a tokenizer.json, ValueError where it is no byte-level BPE.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json")
        full = _read_tokenizer_json(file)
        added = _added_tokens(file, full)
        encoder = _build_encoder(full.model, full.pre_tokenizer, full.normalizer)
        _check_unreachable(file, encoder, added)

        config = _read_json(folder / "tokenizer_config.json")
        bos = added.get(_token_text(config.get("bos_token")))
        eos = added.get(_token_text(config.get("eos_token")))
        eos_ids = _read_json(folder / "generation_config.json").get("eos_token_id", [])
        add_bos = config.get("add_bos_token")
        if add_bos is None:
            add_bos = bos is not None and full.encode("").ids[:1] == [bos.id]
        return cls(
            encoder,
            vocab_size=max(
                full.get_vocab_size(with_added_tokens=False), *(token.id + 1 for token in added.values()), 0
            ),
            added_tokens=added,
            bos_token_id=bos.id if bos else None,
            eos_token_ids=([eos.id] if eos else []) + (eos_ids if isinstance(eos_ids, list) else [eos_ids]),
            add_bos=bool(add_bos),
            suffix_ids=_suffix_ids(full, added),
        )

    def encode(self, text: str, *, parse_special: bool = True, add_bos: bool | None = None) -> list[int]:
        """The ids of `text`. With `parse_special`, and only then, an added token's text becomes that token.

        Raises ValueError where the text holds a lone surrogate, which has no UTF-8.
        """
        ids = self.encode_spans(self.split(text) if parse_special else [text])
        if self.bos_token_id is not None and (self.add_bos if add_bos is None else add_bos):
            ids.insert(0, self.bos_token_id)
        return ids

    def split(self, text: str) -> list[str | int]:
        """Cut at each added token, the longest where several start: spans of text, and token ids."""
        spans: list[str | int] = []
        position = 0
        for match in self._added_pattern.finditer(text):
            spans += (text[position : match.start()], self.added_tokens[match[0]].id)
            position = match.end()
        spans.append(text[position:])
        return [span for span in spans if span != ""]

    def encode_spans(self, spans: Sequence[str | int]) -> list[int]:
        """The ids of spans of text, in which no added token is looked for, and of token ids, which stay."""
        texts = [span for span in spans if isinstance(span, str)]
        lossy = [self._loses_bytes(text) for text in texts]
        encoder = self._lossy_encoder if any(lossy) else self._encoder
        # The batch call releases the interpreter lock and keeps no offsets, which is a fifth of the memory.
        encodings = iter(encoder.encode_batch_fast(texts, add_special_tokens=False))
        ids: list[int] = []
        for span in spans:
            if isinstance(span, str):
                ids += next(encodings).ids
            else:
                ids.append(span)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for an id that has no text."""
        if (added := self._added_bytes.get(token_id)) is not None:
            return added
        token = self._encoder.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        return b"" if token is None else _token_bytes(token)

    def vocabulary(self) -> list[bytes]:
        """`token_bytes` of every id, at a fraction of the time."""
        texts = [b""] * self.vocab_size
        for token, token_id in self._encoder.get_vocab(with_added_tokens=False).items():
            texts[token_id] = _token_bytes(token)
        for token_id, text in self._added_bytes.items():
            texts[token_id] = text
        return texts

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that are no UTF-8 become U+FFFD; `skip_special` drops control tokens."""
        skipped = self.special_ids if skip_special else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")

    def _loses_bytes(self, text: str) -> bool:
        content = _utf8(text)
        return len(content.translate(None, self._lossy_bytes)) < len(content)


def match_any(texts: Iterable[str]) -> str:
    """A regular expression for the longest of `texts` at each place: a trie, so that search stays linear."""
    trie: dict[str, Any] = {}
    for text in texts:
        node = trie
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return _trie_pattern(trie) if trie else "(?!)"


def _trie_pattern(node: dict[str, Any]) -> str:
    prefix = ""
    while len(node) == 1 and "" not in node:  # one way on: no group
        ((char, node),) = node.items()
        prefix += re.escape(char)
    branches = [re.escape(char) + _trie_pattern(child) for char, child in node.items() if char]
    if not branches:
        return prefix
    return f"{prefix}(?:{'|'.join(branches)}){'?' if '' in node else ''}"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: the printable ones themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()
# For `str.translate`: each character's byte as the character of that number; what is in no alphabet, beyond.
_LATIN_OF_CHAR = dict.fromkeys(range(256), 0x100) | {ord(char): byte for char, byte in BYTE_OF_CHAR.items()}


def _token_bytes(token: str) -> bytes:
    try:
        return token.translate(_LATIN_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:  # not in the byte alphabet: the text itself
        return token.encode()


def _kind(text: str, *, is_control: bool) -> TokenKind:
    return TokenKind.CONTROL if is_control or _CONTROL_FORM.fullmatch(text) else TokenKind.USER_DEFINED


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise ValueError(f"text holds a lone surrogate ({code}) at position {error.start}") from None


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise ValueError(f"the GGUF has no {key}")
    return metadata[key]


def _token_kinds(metadata: Mapping[str, Any], count: int) -> list[int]:
    """As Python's numbers, which compare faster than numpy's."""
    kinds = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * count)
    if len(kinds) != count:
        raise ValueError(f"tokenizer.ggml.token_type has {len(kinds)} entries for {count} tokens")
    numbers: list[int] = np.asarray(kinds).tolist()
    return numbers


def _gguf_presplit(metadata: Mapping[str, Any]) -> Presplit:
    model = _required(metadata, "tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(f"tokenizer.ggml.model {model!r} is not supported; supported: gpt2")
    name = _required(metadata, "tokenizer.ggml.pre")
    if name not in PRESPLITS:
        raise ValueError(f"tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(PRESPLITS)}")
    return PRESPLITS[name]


def _build_bpe(vocab: dict[str, int], merges: Sequence[str], presplit: Presplit) -> models.BPE:
    pairs = [(left, right) for left, space, right in (merge.partition(" ") for merge in merges) if space]
    if len(pairs) != len(merges):
        raise ValueError("tokenizer.ggml.merges holds an entry that is not two tokens")
    try:
        return models.BPE(vocab, pairs, ignore_merges=presplit.ignore_merges)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from None


def _build_encoder(
    model: models.Model,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None,
) -> tokenizers.Tokenizer:
    encoder = tokenizers.Tokenizer(model)  # shares the model, so that a second encoder costs nothing
    encoder.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        encoder.normalizer = normalizer
    return encoder


def _lossy_encoder(encoder: tokenizers.Tokenizer, lossy_bytes: bytes) -> tokenizers.Tokenizer:
    """As `encoder`, but none merges across a byte without a token, as in llama.cpp; the split takes time."""
    chars = "".join(rf"\x{{{ord(char):x}}}" for char, byte in BYTE_OF_CHAR.items() if byte in lossy_bytes)
    removal = pre_tokenizers.Split(Regex(f"[{chars}]"), "removed")
    return _build_encoder(
        encoder.model, pre_tokenizers.Sequence([encoder.pre_tokenizer, removal]), encoder.normalizer
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def _read_tokenizer_json(file: Path) -> tokenizers.Tokenizer:
    try:
        full = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file} could not be read: {error}") from None
    if not isinstance(full.model, models.BPE) or not isinstance(full.decoder, decoders.ByteLevel):
        found = f"model {type(full.model).__name__}, decoder {type(full.decoder).__name__}"
        raise ValueError(f"{file}: {found} is not supported; supported: model BPE, decoder ByteLevel")
    return full


def _added_tokens(file: Path, full: tokenizers.Tokenizer) -> dict[str, AddedToken]:
    """The file's added tokens; none may take in the white space around it or ask for word ends."""
    added: dict[str, AddedToken] = {}
    for token_id, token in full.get_added_tokens_decoder().items():
        if token.lstrip or token.rstrip or token.single_word:
            raise ValueError(f"{file}: lstrip, rstrip and single_word of {token.content!r} are not supported")
        added[token.content] = AddedToken(token_id, _kind(token.content, is_control=token.special))
    return added


def _suffix_ids(full: tokenizers.Tokenizer, added: Mapping[str, AddedToken]) -> list[int]:
    """The control token that the file's post-processor puts last, if it does."""
    last = full.encode("a").ids[-1:]
    return last if last[0] in {token.id for token in added.values()} else []


def _check_unreachable(file: Path, encoder: tokenizers.Tokenizer, added: Mapping[str, AddedToken]) -> None:
    """Plain text must never become a control token, whatever the merges."""
    texts = [text for text, token in added.items() if token.kind is TokenKind.CONTROL]
    encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        if added[text].id in encoding.ids:
            raise ValueError(f"{file}: plain text can become the control token {text!r}")


def _token_text(entry: Any) -> str:
    """tokenizer_config.json names a token by its text or by an object that has it; "" is no token."""
    return str(entry.get("content", "")) if isinstance(entry, dict) else str(entry or "")
