"""A GGUF model in several files, `NAME-00001-of-0000N.gguf`, as llama-gguf-split writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinn.weights.errors import WeightsError
from jinn.weights.gguf import GGUFFile, MetadataValue
from jinn.weights.shards import Shards

_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GGUFShards(Shards):
    """All parts of a model, found by the path of any: metadata of the first, tensors of all.

    Raises WeightsError naming a part that is missing or belongs to another model.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.metadata: dict[str, MetadataValue] = {}
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
        self._add_shard(shard)
        if number == 0:
            self.metadata = shard.metadata
        for key, value in {"split.no": number, "split.count": count}.items():
            if shard.metadata.get(key) != value:
                raise WeightsError(
                    f"{path}: metadata key {key!r} is {shard.metadata.get(key)!r}, not {value!r}"
                )

    def _check_count(self) -> None:
        expected: Any = self.metadata.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise WeightsError(
                f"{self._shards[0].path}: metadata key 'split.tensors.count' is {expected}, "
                f"but all parts have {len(self.tensors)} tensors"
            )


def _shard_paths(path: Path) -> list[Path]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise WeightsError(f"{path}: is one of several parts, but is not called NAME-00001-of-0000N.gguf")
    count = int(match["count"])
    return [
        path.with_name(f"{match['prefix']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)
    ]
