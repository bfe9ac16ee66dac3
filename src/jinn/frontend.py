"""What stands between text and an engine: a model's tokenizer, chat template and sampling defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinn.engine.messages import Pooling, SamplingParams
from jinn.models.fields import ConfigError
from jinn.models.generation import generation_defaults
from jinn.models.registry import model_of
from jinn.text.template import ChatTemplate, encode_chat
from jinn.text.tokenizer import Tokenizer
from jinn.weights.checkpoint import Checkpoint, open_checkpoint
from jinn.weights.errors import WeightsError

_GGUF_POOLING_LAST = 3  # llama.cpp's LLAMA_POOLING_TYPE_LAST
_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Frontend:
    """`template` is None where the model has none."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling_defaults: SamplingParams
    pooling: Pooling  # of hidden states, for embeddings

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """The ids of a conversation; see `jinn.text.template.encode_chat`."""
        return encode_chat(self.tokenizer, self.template, messages, **kwargs)


def load_frontend(path: str | Path, chat_template: str | Path | None = None) -> Frontend:
    """Read a model's text side; `chat_template` is a file that takes the place of the model's own.

    Raises ValueError, one line: WeightsError, ConfigError, TemplateError, or what the tokenizer lacks.
    """
    with open_checkpoint(path) as checkpoint:
        model_of(checkpoint)  # what a model is counts more than what its tokenizer lacks
        template = _template(checkpoint) if chat_template is None else None
        tokenizer = _tokenizer(checkpoint)
        defaults = _sampling_defaults(checkpoint)
        pooling = _pooling(checkpoint)
    if chat_template is not None:
        template = ChatTemplate(Path(chat_template).read_text(encoding="utf-8"))
    return Frontend(tokenizer, template, defaults, pooling)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a model's tokenizer alone. Raises as `load_frontend`."""
    with open_checkpoint(path) as checkpoint:
        return _tokenizer(checkpoint)


def _template(checkpoint: Checkpoint) -> ChatTemplate | None:
    if checkpoint.kind == "gguf":
        return ChatTemplate.from_gguf(checkpoint.config_source)
    return ChatTemplate.from_folder(checkpoint.path)


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.kind != "gguf":
        return Tokenizer.from_folder(checkpoint.path)
    try:
        return Tokenizer.from_gguf(checkpoint.config_source)
    except ValueError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from None


def _sampling_defaults(checkpoint: Checkpoint) -> SamplingParams:
    defaults = generation_defaults(checkpoint)
    given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(defaults, name)) is not None}
    try:
        return SamplingParams(**given)
    except ValueError as error:
        raise ConfigError(f"{checkpoint.path}: generation default {error}") from None


def _pooling(checkpoint: Checkpoint) -> Pooling:
    """The last token where an embedding model says so, in either format; the mean otherwise."""
    if checkpoint.kind == "gguf":
        metadata = checkpoint.config_source
        kind = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
        return Pooling.LAST if kind == _GGUF_POOLING_LAST else Pooling.MEAN
    file = Path(checkpoint.path) / "1_Pooling" / "config.json"  # of sentence-transformers
    if not file.is_file():
        return Pooling.MEAN
    config = json.loads(file.read_text(encoding="utf-8"))
    is_last = isinstance(config, dict) and config.get("pooling_mode_lasttoken")
    return Pooling.LAST if is_last else Pooling.MEAN
