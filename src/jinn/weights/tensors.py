"""Where a checkpoint's tensors lie in their file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinn.weights.block_formats import BlockFormat
from jinn.weights.errors import WeightsError, quoted


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its file stores it: rows of blocks, the last axis of `shape` contiguous.

    `shape` is in PyTorch's order, [out, in] for a linear. `offset` counts bytes from the start of the file;
    it is a multiple of the file's alignment in GGUF, and of nothing in safetensors.
    """

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def check_layout(path: Path, tensors: Iterable[TensorInfo], file_size: int) -> None:
    """Raise WeightsError for the first tensor that leaves the file or overlaps another."""
    end, previous = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        where = f"{path}: byte {tensor.offset}: tensor {quoted(tensor.name)}"
        if tensor.offset + tensor.nbytes > file_size:
            raise WeightsError(f"{where} has {tensor.nbytes} bytes, past the end of the file at {file_size}")
        if tensor.offset < end:
            raise WeightsError(f"{where} overlaps tensor {quoted(previous)}, which ends at byte {end}")
        end, previous = tensor.offset + tensor.nbytes, tensor.name
