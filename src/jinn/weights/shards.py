"""The tensors of several files as if they were one's."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jinn.weights.errors import WeightsError, quoted
from jinn.weights.tensors import TensorInfo


class Shard(Protocol):
    """One of the files."""

    path: Path
    tensors: dict[str, TensorInfo]

    def data(self, name: str) -> npt.NDArray[np.uint8]: ...

    def release(self, name: str) -> None: ...

    def close(self) -> None: ...


class Shards:
    """Files whose tensors are all in `tensors`. No two of them may have one in common."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._shards: list[Shard] = []
        self._shard_of: dict[str, Shard] = {}

    @property
    def files(self) -> list[Path]:
        """All files, in order."""
        return [shard.path for shard in self._shards]

    def _add_shard(self, shard: Shard) -> None:
        """Take over an open file. Raises WeightsError for a tensor that another has too."""
        self._shards.append(shard)
        for name, info in shard.tensors.items():
            if name in self.tensors:
                raise WeightsError(
                    f"{shard.path}: tensor {quoted(name)} is also in {self._shard_of[name].path.name}"
                )
            self.tensors[name] = info
            self._shard_of[name] = shard

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes [nbytes], a read-only view of its file. Raises KeyError for an unknown name."""
        return self._shard_of[name].data(name)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory; reading them again is allowed."""
        self._shard_of[name].release(name)

    def close(self) -> None:
        """Close the files; views that were handed out stay valid."""
        for shard in self._shards:
            shard.close()
