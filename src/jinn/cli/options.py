"""What several commands take: the model argument, adapters, sizes in bytes, and defaults for help texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from jinn.engine.config import EngineConfig
from jinn.server.config import ServerConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)

DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in fields(EngineConfig) + fields(ServerConfig)
}

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A .gguf file, a Hugging Face folder or a pulled name; without one, the packaged SmolLM2-135M.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(metavar="N", help="Threads to compute with.", show_default="the physical cores")
]


def _lora_option(help_text: str) -> Any:
    return typer.Option("--lora", metavar="NAME=DIR", help=help_text, show_default=False)


LorasOption = Annotated[
    list[str] | None,
    _lora_option("A LoRA adapter of the first model, served as a model of this name; repeat it for more."),
]
LoraOption = Annotated[
    list[str] | None, _lora_option("A LoRA adapter of the model, which answers go through.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite DST.")]
TARGET_HELP = "What to write: a name in .gguf, or else a Hugging Face folder."
TYPE_HELP = "Type of the matrices: f32, f16 or bf16, and in GGUF also q8_0, q6_k, q4_k, q4_1 or q4_0."
MaxTokensOption = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens of an answer at most.", show_default=False)
]


def parse_size(text: str) -> int:
    """Bytes of `2GiB`, `512MiB`, `4GB` or `1e9`. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"] not in _UNITS:
        raise ValueError(f"size {text!r} is not a number with one of {', '.join(filter(None, _UNITS))}")
    size = int(float(match["number"]) * _UNITS[match["unit"]])
    if not 1 <= size <= 2**62:
        raise ValueError(f"size {text!r} is out of range")
    return size


def parse_adapters(adapters: Sequence[str]) -> dict[str, str]:
    """Folders by name, from `name=folder` each. Raises ValueError."""
    named = by_name(adapters, "lora must be distinct names with folders, such as name=folder")
    return {name: str(Path(folder).expanduser()) for name, folder in named.items()}


def parse_adapter(adapters: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The name of the one adapter, None without one, and its folder by that name. Raises ValueError."""
    folders = parse_adapters(adapters)
    if len(folders) > 1:
        raise ValueError(f"lora must be one adapter, not {len(folders)}: {', '.join(folders)}")
    return next(iter(folders), None), folders


def by_name(texts: Sequence[str], rule: str) -> dict[str, str]:
    """What follows each `name=`. Raises ValueError, which begins with the rule, for a text that breaks it."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, value = str(text).partition("=")
        if not equals or not 1 <= len(name) <= 256 or not value or name in named:
            raise ValueError(f"{rule}, not {text}")
        named[name] = value
    return named


def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises ValueError, OSError."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from None


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """A line of a table: the first column to the left, numbers to the right."""
    numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([row[0].ljust(widths[0]), *numbers])
