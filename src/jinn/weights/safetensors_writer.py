"""Writes safetensors, a tensor at a time: one file, or shards with their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from struct import pack

from jinn.weights.output import OutputTensor, Progress, total_progress
from jinn.weights.safetensors import INDEX_FILE, SINGLE_FILE

MAX_SHARD_BYTES = 5 * 10**9


def write_safetensors(
    folder: Path, tensors: Sequence[OutputTensor], progress: Progress, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the tensors, of types F32, F16 or BF16, into a folder, and what loaders find them by."""
    shards = _shards(tensors, max_shard_bytes)
    count = total_progress(tensors, progress)
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, tensors, count)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, count)
        weight_map.update({tensor.name: name for tensor in shard})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Sequence[OutputTensor], max_bytes: int) -> list[list[OutputTensor]]:
    """Runs of tensors, each of at most `max_bytes` unless it is a single tensor."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(path: Path, tensors: Sequence[OutputTensor], count: Callable[[int], None]) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.format.name,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that tensors are aligned
    with path.open("xb") as file:
        file.write(pack("<Q", len(header)) + header)
        for tensor in tensors:
            tensor.write(file, count)
