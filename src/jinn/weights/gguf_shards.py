"""A GGUF model in several files, `NAME-00001-of-0000N.gguf`, as llama-gguf-split writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jinn.weights.errors import WeightsError, quoted
from jinn.weights.gguf import GGUFFile, MetadataValue
from jinn.weights.tensors import TensorInfo

_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFShards:
    """All parts of a model, found by the path of any: metadata of the first, tensors of all.

    Raises WeightsError naming a part that is missing or belongs to another model.
    """

    def __init__(self, path: Path) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, MetadataValue] = {}
        self._shards: list[GGUFFile] = []
        self._shard_of: dict[str, GGUFFile] = {}
        try:
            paths = _shard_paths(path)
            for number, shard_path in enumerate(paths):
                self._add(shard_path, number, len(paths))
            self._check_count()
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, number: int, count: int) -> None:
        if not path.exists():
            raise WeightsError(f"{path}: is missing, one of {count} parts")
        shard = GGUFFile(path)
        self._shards.append(shard)
        if number == 0:
            self.metadata = shard.metadata
        for key, value in {"split.no": number, "split.count": count}.items():
            if shard.metadata.get(key) != value:
                raise WeightsError(
                    f"{path}: metadata key {key!r} is {shard.metadata.get(key)!r}, not {value!r}"
                )
        for name, info in shard.tensors.items():
            if name in self.tensors:
                raise WeightsError(
                    f"{path}: tensor {quoted(name)} is also in {self._shard_of[name].path.name}"
                )
            self.tensors[name] = info
            self._shard_of[name] = shard

    def _check_count(self) -> None:
        expected: Any = self.metadata.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise WeightsError(
                f"{self._shards[0].path}: metadata key 'split.tensors.count' is {expected}, "
                f"but all parts have {len(self.tensors)} tensors"
            )

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes [nbytes], a read-only view of its part. Raises KeyError for an unknown name."""
        return self._shard_of[name].data(name)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory; reading them again is allowed."""
        self._shard_of[name].release(name)

    def close(self) -> None:
        """Close the files; views that were handed out stay valid."""
        for shard in self._shards:
            shard.close()


def _shard_paths(path: Path) -> list[Path]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise WeightsError(f"{path}: is one of several parts, but is not called NAME-00001-of-0000N.gguf")
    count = int(match["count"])
    return [
        path.with_name(f"{match['prefix']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)
    ]
