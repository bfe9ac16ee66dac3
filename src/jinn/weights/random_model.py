"""Models with random weights, written a few megabytes at a time.

The spread of each weight keeps what flows through the model at about one, so that logits are finite, and
neither constant nor of a single token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import log, prod, sqrt
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt

from jinn.models.config import hf_fields
from jinn.models.decoder import Decoder
from jinn.models.parameters import NewFile, Origin, ParameterSpec
from jinn.models.registry import model_of_config
from jinn.weights.atomic import atomic_output
from jinn.weights.block_formats import BF16, Q4_0, BlockFormat
from jinn.weights.config_files import gguf_metadata
from jinn.weights.errors import WeightsError
from jinn.weights.file_types import FOLDER_TYPES, GGUF_TYPES, TORCH_DTYPES, file_type, gguf_type, wanted_type
from jinn.weights.gguf_writer import write_gguf
from jinn.weights.model_folder import write_json
from jinn.weights.output import OutputTensor, Progress, in_order
from jinn.weights.quantize import quantize
from jinn.weights.random_blocks import random_blocks
from jinn.weights.safetensors_writer import write_safetensors
from jinn.weights.synthetic_tokenizer import synthetic_tokenizer
from jinn.weights.tokenizer_files import hf_tokenizer

_CHUNK_BYTES = 16 << 20
_NORM_SPREAD, _BIAS_SPREAD, _CONV_SPREAD = 0.1, 0.02, 0.5
_DECAYS = (1.0, 16.0)  # exp(A_log), as Mamba-2 starts
_LOG_TIME_STEPS = (log(1e-3), log(1e-1))  # of softplus(dt_bias)
_RESIDUAL = ("o_proj", "out_proj", "down_proj")  # added to the residual stream, twice in each layer


def write_random(
    name: str,
    config: Mapping[str, Any],
    target: Path,
    type_name: str | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    num_threads: int = 1,
    progress: Progress = lambda done, total: None,
) -> int:
    """Write a model with this config.json: a GGUF file where `target` ends so, or else a folder.

    `name` is general.name. Returns the bytes of its tensors; the same seed gives the same ones. Raises
    ConfigError, WeightsError.
    """
    kind: Literal["gguf", "hf"] = "gguf" if target.suffix == ".gguf" else "hf"
    default = Q4_0 if kind == "gguf" else BF16
    wanted = wanted_type(type_name, GGUF_TYPES if kind == "gguf" else FOLDER_TYPES) if type_name else default
    model = model_of_config(config)
    if not isinstance(model, Decoder):
        raise WeightsError(f"models of family {model.family!r} cannot be written")
    tokenizer = synthetic_tokenizer(model.family, model.vocab_size)
    with ThreadPoolExecutor(num_threads) as pool:
        tensors = [tensor.output(pool, num_threads, seed) for tensor in _tensors(model, kind, wanted)]
        size = sum(tensor.nbytes for tensor in tensors)
        with atomic_output(target, size, overwrite=overwrite) as path:
            if kind == "gguf":
                metadata = gguf_metadata(name, model, hf_fields(config), {}) | tokenizer
                metadata["general.file_type"] = file_type(wanted)
                write_gguf(path, metadata, tensors, progress)
            else:
                path.mkdir()
                write_json(path / "config.json", {**config, "torch_dtype": TORCH_DTYPES[wanted.name]})
                for name, content in hf_tokenizer(tokenizer).items():
                    write_json(path / name, content)
                write_safetensors(path, tensors, progress)
    return size


@dataclass(frozen=True, slots=True)
class _RandomTensor:
    """A tensor of the file, and a parameter that it holds, whose rules hold for all of it."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    parameter: str
    spec: ParameterSpec
    origin: Origin
    model: Decoder

    def output(self, pool: Executor, num_ahead: int, seed: int) -> OutputTensor:
        """The tensor to write; up to `num_ahead` pieces are made in `pool` before they are needed."""

        def tasks() -> Iterator[Callable[[], npt.NDArray[np.uint8]]]:
            for number, num_blocks in enumerate(self._pieces()):
                rng = np.random.Generator(np.random.SFC64([seed, crc32(self.name.encode()), number]))
                yield partial(self._make, rng, num_blocks)

        return OutputTensor(self.name, self.format, self.shape, lambda: in_order(pool, num_ahead, tasks()))

    def _pieces(self) -> Iterator[int]:
        """Numbers of blocks."""
        left = prod(self.shape) // self.format.block_elems
        while left:
            num_blocks = min(left, max(1, _CHUNK_BYTES // self.format.block_bytes))
            yield num_blocks
            left -= num_blocks

    def _make(self, rng: np.random.Generator, num_blocks: int) -> npt.NDArray[np.uint8]:
        if len(self.spec.shape) > 1:
            return random_blocks(rng, self.format, num_blocks, self._spread())
        values = self._vector(rng).astype(np.float32)
        return quantize(
            values if self.origin.encoding is None else self.origin.encoding.encode(values), self.format
        )

    def _spread(self) -> float:
        """The standard deviation of a matrix."""
        module, num_columns = self.parameter.split(".")[-2], self.spec.shape[-1]
        if module == "conv1d":
            return _CONV_SPREAD
        if module == "embed_tokens" and not self.model.tie_word_embeddings:
            return 1.0
        depth = 2 * self.model.num_hidden_layers if module in _RESIDUAL else 1
        return 1 / sqrt(num_columns * depth)

    def _vector(self, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """A norm's weights, a bias, or what decides how fast a state decays."""
        size = self.spec.shape
        if self.parameter.endswith("A_log"):
            return np.log(rng.uniform(*_DECAYS, size))
        if self.parameter.endswith("dt_bias"):
            steps: npt.NDArray[np.float64] = np.exp(rng.uniform(*_LOG_TIME_STEPS, size))
            return np.asarray(np.log(np.expm1(steps)))
        if self.parameter.endswith("bias"):
            return rng.normal(0, _BIAS_SPREAD, size)
        # norms that scale by 1 + weight are about 0
        is_offset = self.model.norm_offset and "linear_attn" not in self.parameter
        return rng.normal(0 if is_offset else 1, _NORM_SPREAD, size)


def _tensors(model: Decoder, kind: Literal["gguf", "hf"], wanted: BlockFormat) -> list[_RandomTensor]:
    places = model.origins(NewFile(kind))
    tensors: dict[str, _RandomTensor] = {}
    for parameter, spec in model.parameters().items():
        place = places[parameter]
        shape = place.shape_of(spec)
        for name in place.names:
            block_format = gguf_type(name, shape, wanted, wanted) if kind == "gguf" else wanted
            tensors.setdefault(name, _RandomTensor(name, shape, block_format, parameter, spec, place, model))
    return list(tensors.values())
