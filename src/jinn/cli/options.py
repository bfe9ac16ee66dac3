"""What several commands take: the model argument, sizes in bytes, and the defaults that help texts name."""

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
