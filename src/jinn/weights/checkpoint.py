"""One way to open a model's weights, whatever holds them. Names and configs stay as the file has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from jinn.weights.errors import WeightsError
from jinn.weights.finite_check import check_finite
from jinn.weights.fp8 import open_bf16
from jinn.weights.gguf import MAGIC, GGUFFile
from jinn.weights.gguf_shards import GGUFShards
from jinn.weights.model_folder import read_config, read_generation_config
from jinn.weights.safetensors import SafetensorsFolder
from jinn.weights.tensors import TensorInfo

SUPPORTED = "a GGUF file, or a Hugging Face folder with config.json and safetensors"


class TensorSource(Protocol):
    """What GGUFFile and SafetensorsFolder have in common."""

    tensors: dict[str, TensorInfo]

    @property
    def files(self) -> list[Path]: ...

    def data(self, name: str) -> npt.NDArray[np.uint8]: ...

    def release(self, name: str) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open model: its tensors, and what its config says.

    `architecture` is GGUF's general.architecture or Hugging Face's model_type; `config_source` is GGUF's
    metadata or config.json; `generation_config` is generation_config.json, empty for GGUF.
    """

    path: Path
    kind: Literal["gguf", "hf"]
    architecture: str
    config_source: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    source: TensorSource

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return self.source.files

    @property
    def largest_file(self) -> Path:
        return max(self.files, key=lambda path: path.stat().st_size)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes [nbytes], a read-only view of the map. Raises KeyError for an unknown name."""
        return self.source.data(name)

    def check_finite(self, name: str) -> None:
        """Raise WeightsError where the tensor holds a NaN or infinite value or block scale."""
        try:
            check_finite(self.tensors[name], self.data(name))
        except WeightsError as error:
            raise WeightsError(f"{self.path}: {error}") from None

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory; reading them again is allowed."""
        self.source.release(name)

    def close(self) -> None:
        """Close the files; views that were handed out stay valid."""
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .gguf file or a Hugging Face folder. Raises WeightsError, one line that says what was found."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    _check_magic(path)
    return _open_gguf(path)


def _open_folder(path: Path) -> Checkpoint:
    if not (path / "config.json").exists():
        raise WeightsError(f"{path}: a folder without config.json; supported is {SUPPORTED}")
    config = read_config(path)
    architecture = config.get("model_type")
    if not isinstance(architecture, str):
        raise WeightsError(f"{path / 'config.json'}: model_type is missing or not a string")
    generation_config = read_generation_config(path)
    return Checkpoint(path, "hf", architecture, config, generation_config, open_bf16(SafetensorsFolder(path)))


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened: {error.strerror}") from None
    if magic != MAGIC:
        raise WeightsError(
            f"{path}: begins with {magic!r}, which is no known model; supported is {SUPPORTED}"
        )


def _open_gguf(path: Path) -> Checkpoint:
    file: GGUFFile | GGUFShards = GGUFFile(path)
    if file.metadata.get("split.count", 1) not in (0, 1):
        file.close()
        file = GGUFShards(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        file.close()
        raise WeightsError(f"{path}: metadata key 'general.architecture' is missing or not a string")
    return Checkpoint(path, "gguf", architecture, file.metadata, {}, file)
