"""Carries a byte-level BPE tokenizer and its chat templates between Hugging Face's files and GGUF."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jinn.text.presplit import PRESPLITS
from jinn.text.tokenizer import Tokenizer, TokenKind
from jinn.weights.errors import WeightsError, quoted
from jinn.weights.gguf import MetadataValue
from jinn.weights.model_folder import file_in, read_json

# `tokenizer.ggml.token_type`
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_TOKENIZER, _CONFIG, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_PREFIX = "tokenizer.ggml."
_TEMPLATE_KEY = "tokenizer.chat_template"


def gguf_tokenizer(folder: Path, vocab_size: int) -> dict[str, MetadataValue]:
    """The `tokenizer.*` metadata of a folder's tokenizer; ids up to `vocab_size` without a token are unused.

    Raises WeightsError, ValueError where it is no byte-level BPE whose pre-tokenizer is known.
    """
    tokenizer = Tokenizer.from_folder(folder)
    full, config = read_json(folder, _TOKENIZER), _optional_json(folder, _CONFIG)
    tokens, types = _token_list(full, tokenizer, vocab_size, folder)
    metadata: dict[str, MetadataValue] = {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": _presplit_name(full, folder),
        f"{_PREFIX}tokens": tokens,
        f"{_PREFIX}token_type": np.array(types, np.int32),
        f"{_PREFIX}merges": [_merge_text(merge) for merge in full["model"]["merges"]],
    }
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": _token_id(config.get("eos_token"), tokenizer),
        "padding": _token_id(config.get("pad_token"), tokenizer),
    }
    metadata |= {
        f"{_PREFIX}{name}_token_id": token_id for name, token_id in ids.items() if token_id is not None
    }
    metadata[f"{_PREFIX}add_bos_token"] = tokenizer.add_bos
    return metadata | _gguf_templates(_folder_templates(folder, config))


def hf_tokenizer(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, by name, of GGUF's metadata. Raises ValueError."""
    tokenizer = Tokenizer.from_gguf(metadata)
    tokens, types = metadata[f"{_PREFIX}tokens"], metadata[f"{_PREFIX}token_type"]
    presplit = PRESPLITS[metadata[f"{_PREFIX}pre"]]
    vocab = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind == _NORMAL}
    added = sorted(tokenizer.added_tokens.items(), key=lambda item: item[1].id)
    # the library numbers added tokens on from the vocabulary's end: others must stand in the vocabulary
    next_id = len(vocab)
    for text, token in added:
        if token.id == next_id:
            next_id += 1
        else:
            vocab[text] = token.id
    full = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_entry(token.id, text, token.kind) for text, token in added],
        "normalizer": {"type": "NFC"} if presplit.use_nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_state(step) for step in presplit.steps]},
        "post_processor": _post_processor(tokenizer, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": presplit.ignore_merges,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [merge.split(" ") for merge in metadata[f"{_PREFIX}merges"]],
        },
    }
    return {_TOKENIZER: full, _CONFIG: _hf_config(metadata, tokenizer)}


def _hf_config(metadata: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = metadata[f"{_PREFIX}tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token_id = metadata.get(f"{_PREFIX}{key}_token_id")
        if isinstance(token_id, int) and token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    config["add_bos_token"] = tokenizer.add_bos
    template = metadata.get(_TEMPLATE_KEY)
    named = {
        key[len(_TEMPLATE_KEY) + 1 :]: text
        for key, text in metadata.items()
        if key.startswith(f"{_TEMPLATE_KEY}.")
    }
    if named:
        templates = {"default": template, **named}
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    elif template is not None:
        config["chat_template"] = template
    return config


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder, name) if file_in(folder, name).exists() else {}


def _token_list(
    full: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int, folder: Path
) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    if tokenizer.vocab_size > vocab_size:
        raise WeightsError(
            f"{folder / _TOKENIZER}: has {tokenizer.vocab_size} ids, but the model {vocab_size} rows"
        )
    tokens = [f"[PAD{token_id}]" for token_id in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for text, token_id in full["model"]["vocab"].items():
        tokens[token_id], types[token_id] = text, _NORMAL
    for text, token in tokenizer.added_tokens.items():
        tokens[token.id] = text
        types[token.id] = _CONTROL if token.kind is TokenKind.CONTROL else _USER_DEFINED
    return tokens, types


def _merge_text(merge: str | Sequence[str]) -> str:
    text = merge if isinstance(merge, str) else " ".join(merge)
    if text.count(" ") != 1:
        raise WeightsError(f"{_TOKENIZER}: the merge {quoted(text)} is not of two tokens without spaces")
    return text


def _token_id(entry: Any, tokenizer: Tokenizer) -> int | None:
    """Of a token that tokenizer_config.json names by its text, or by an object that has it."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    token = tokenizer.added_tokens.get(text) if isinstance(text, str) else None
    return token.id if token else None


def _presplit_name(full: Mapping[str, Any], folder: Path) -> str:
    """The name under which GGUF knows the pre-tokenizer."""
    found = _steps(full.get("pre_tokenizer"))
    for name, presplit in PRESPLITS.items():
        if _steps({"type": "Sequence", "pretokenizers": [_state(step) for step in presplit.steps]}) == found:
            return name
    raise WeightsError(f"{folder / _TOKENIZER}: its pre_tokenizer is none of {', '.join(PRESPLITS)}")


def _steps(pre_tokenizer: Any) -> list[tuple[Any, ...]]:
    """What of a pre-tokenizer decides the split, in a form to compare."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    return [_step(step) for step in steps]


def _step(step: Mapping[str, Any]) -> tuple[Any, ...]:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else pattern
    if isinstance(regex, str):
        regex = re.sub(r"\\x\{([0-9A-Fa-f]+)\}", lambda match: chr(int(match[1], 16)), regex)
    options = ("behavior", "invert", "individual_digits", "add_prefix_space", "use_regex")
    return (step.get("type"), regex, *(step.get(option) for option in options))


def _state(step: Any) -> dict[str, Any]:
    """A pre-tokenizer of the library as tokenizer.json has it."""
    state: dict[str, Any] = json.loads(step.__getstate__())
    return state


def _post_processor(tokenizer: Tokenizer, tokens: Sequence[str]) -> dict[str, Any]:
    if not tokenizer.add_bos or tokenizer.bos_token_id is None:
        return {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    bos = tokens[tokenizer.bos_token_id]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}},
    }


def _added_entry(token_id: int, text: str, kind: TokenKind) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": kind is TokenKind.CONTROL,
    }


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a model's only one is "default"."""
    file = file_in(folder, _TEMPLATE)
    source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if isinstance(source, list):
        return {entry["name"]: entry["template"] for entry in source}
    return {} if source is None else {"default": source}


def _gguf_templates(templates: Mapping[str, str]) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for name, text in templates.items():
        metadata[_TEMPLATE_KEY if name == "default" else f"{_TEMPLATE_KEY}.{name}"] = text
    named = [name for name in templates if name != "default"]
    if named:
        metadata["tokenizer.chat_templates"] = named
    return metadata
