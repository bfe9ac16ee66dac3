"""The JSON files of a Hugging Face model folder, and the rule that nothing is read from outside it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinn.weights.errors import WeightsError, quoted

MAX_JSON_BYTES = 64 << 20  # the index of a model with 100,000 tensors takes about 10 MB


def file_in(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`, existing or not. Raises WeightsError where it would lead elsewhere.

    Links from `<repo>/snapshots/<commit>` to `<repo>/blobs`, as huggingface_hub makes them, are followed.
    """
    if not name or "\0" in name or "\\" in name or name in (".", "..") or Path(name).name != name:
        raise WeightsError(f"{folder}: {quoted(name)} is not a plain file name")
    path = folder / name
    target = path.resolve()
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise WeightsError(f"{path}: leads out of the model's folder")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of `folder`. Raises WeightsError naming the file."""
    path = file_in(folder, name)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > MAX_JSON_BYTES:
        raise WeightsError(f"{path}: is larger than {MAX_JSON_BYTES} bytes")
    return parse_json_object(text, str(path))


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object whose keys are unique at every level. Raises WeightsError beginning with `where`."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise WeightsError(f"{where}: not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{where}: holds a JSON {type(value).__name__}, not an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {quoted(repeated)} appears twice")
    return value


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json. Raises WeightsError where it is missing or broken."""
    return read_json(Path(folder), "config.json")


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """The folder's generation_config.json, sampling defaults and end-of-sequence ids; empty where missing."""
    folder = Path(folder)
    name = "generation_config.json"
    return read_json(folder, name) if file_in(folder, name).exists() else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object in UTF-8, indented for people unless it is a vocabulary."""
    indent = None if path.name == "tokenizer.json" else 2
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def plain_name(name: str) -> str:
    """A file's name for anything: plain characters that no name can steer, and a hash to keep names apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "--", name)
    return f"{plain[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
