"""Reads safetensors, one file or the shards of a Hugging Face folder, as strictly as the format's own reader.

A file is the header's length (uint64), a JSON header, then the tensors, which must cover the rest of the file
without gap or overlap. The header is checked against the file before a tensor is looked at.
"""

from __future__ import annotations

from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Any, Self, TypeGuard

import numpy as np
import numpy.typing as npt

from jinn.weights.block_formats import BF16, F8_E4M3, F16, F32
from jinn.weights.errors import WeightsError, quoted
from jinn.weights.mapped_file import MappedFile
from jinn.weights.model_folder import file_in, parse_json_object, read_json
from jinn.weights.shards import Shards
from jinn.weights.tensors import TensorInfo, check_layout

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMS = 8
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FORMAT_BY_DTYPE = {"F32": F32, "F16": F16, "BF16": BF16, "F8_E4M3": F8_E4M3}

_LENGTH = Struct("<Q")


class SafetensorsFile:
    """One open .safetensors file: `tensors` by name, and their bytes. Raises WeightsError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = MappedFile(self.path)
        try:
            self.tensors = _parse(self._file)
        except BaseException:
            self._file.close()
            raise

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes [nbytes], a read-only view of the map. Raises KeyError for an unknown name."""
        tensor = self.tensors[name]
        return self._file.view(tensor.offset, tensor.nbytes)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory; reading them again is allowed."""
        tensor = self.tensors[name]
        self._file.release(tensor.offset, tensor.nbytes)

    def close(self) -> None:
        """Close the file; views that were handed out stay valid."""
        self._file.close()


class SafetensorsFolder(Shards):
    """The tensors of a folder's model.safetensors, or of the shards that its index lists.

    Every tensor of every shard is in `tensors`. Raises WeightsError for one that the index misplaces or that
    two shards hold.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if file_in(self.path, SINGLE_FILE).exists():
            self._add_shard(SafetensorsFile(file_in(self.path, SINGLE_FILE)))
        elif file_in(self.path, INDEX_FILE).exists():
            weight_map = _read_weight_map(self.path)
            for shard in sorted(set(weight_map.values())):
                self._add_shard(SafetensorsFile(file_in(self.path, shard)))
            self._check_index(weight_map)
        else:
            raise WeightsError(
                f"{self.path}: has neither {SINGLE_FILE} nor {INDEX_FILE}{self._other_weights()}"
            )

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for name, shard in weight_map.items():
            found = self._shard_of.get(name)
            if found is None or found.path.name != shard:
                raise WeightsError(
                    f"{self.path / INDEX_FILE}: tensor {quoted(name)} is not in {quoted(shard)}"
                )

    def _other_weights(self) -> str:
        pickled = sorted(path.name for path in self.path.glob("*.bin"))
        return f"; {pickled[0]} can hold code and is not read, convert it to safetensors" if pickled else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{folder / INDEX_FILE}: weight_map is not an object with entries")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise WeightsError(f"{folder / INDEX_FILE}: tensor {quoted(name)} is not in a .safetensors file")
    return weight_map


def _parse(file: MappedFile) -> dict[str, TensorInfo]:
    if file.size < _LENGTH.size:
        raise WeightsError(
            f"{file.path}: byte 0: the header's length needs 8 bytes, the file has {file.size}"
        )
    (length,) = _LENGTH.unpack(file.read(0, _LENGTH.size))
    limit = min(MAX_HEADER_BYTES, file.size - _LENGTH.size)
    if length > limit:
        raise WeightsError(
            f"{file.path}: byte 0: the header's length is {length}, but at most {limit} is possible"
        )
    where = f"{file.path}: byte {_LENGTH.size}: the header"
    text = file.read(_LENGTH.size, length)
    if not text.startswith(b"{"):
        raise WeightsError(f"{where} begins with {text[:1]!r}, not an object")
    header = parse_json_object(text, where)
    _check_metadata(header.pop("__metadata__", {}), where)
    _check_names(header, where)
    data_start = _LENGTH.size + length
    tensors = {name: _read_entry(where, name, entry, data_start) for name, entry in header.items()}
    check_layout(file.path, tensors.values(), file.size)
    covered = sum(tensor.nbytes for tensor in tensors.values())
    if covered != file.size - data_start:
        raise WeightsError(
            f"{where} describes {covered} bytes of tensors, the file has {file.size - data_start}"
        )
    return tensors


def _check_metadata(metadata: Any, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{where} has a __metadata__ that does not map strings to strings")


def _check_names(header: dict[str, Any], where: str) -> None:
    try:
        "".join(header).encode()
    except UnicodeEncodeError:
        raise WeightsError(f"{where} has a name that is not valid Unicode") from None


def _read_entry(where: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{where}: tensor {quoted(name)}"
    if not isinstance(entry, dict):
        raise WeightsError(f"{where} is not described by an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise WeightsError(f"{where} has a dtype that is not a string")
    if dtype not in FORMAT_BY_DTYPE:
        raise WeightsError(f"{where} has dtype {quoted(dtype)}; supported are {', '.join(FORMAT_BY_DTYPE)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS or 0 in shape:
        raise WeightsError(f"{where} has a shape that is not a list of up to {MAX_DIMS} positive sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise WeightsError(f"{where} has data_offsets that are not a list of two sizes")
    nbytes, span = FORMAT_BY_DTYPE[dtype].nbytes(shape), offsets[1] - offsets[0]
    if span != nbytes:
        raise WeightsError(f"{where} is {dtype} {shape}, {nbytes} bytes, but its data_offsets span {span}")
    return TensorInfo(name, FORMAT_BY_DTYPE[dtype], tuple(shape), data_start + offsets[0], nbytes)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 64 for value in values)
