"""A model's parameters as an open checkpoint keeps them: found and checked once, then read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jinn.models.model import Model
from jinn.models.parameters import Array, Origin, ParameterSpec
from jinn.ops.protocol import FloatArray
from jinn.weights.block_formats import F32, BlockFormat
from jinn.weights.checkpoint import Checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.quantize import dequantize
from jinn.weights.tensors import TensorInfo

# Tensors that repeat another or the config: a tied head, rotary frequencies.
_DERIVED_TENSORS = ("lm_head.weight", "rotary_emb.inv_freq", "rope_freqs.weight")


@dataclass(frozen=True, slots=True)
class ParameterSource:
    """A parameter and the tensors behind it, as `origin.names` has them. Their shapes are right."""

    spec: ParameterSpec
    origin: Origin
    tensors: tuple[TensorInfo, ...]
    checkpoint: Checkpoint

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(info.nbytes for info in self.tensors)

    @property
    def is_expert(self) -> bool:
        """Whether it is a mixture's, of which a token reads only some experts."""
        return self.spec.num_experts_per_tok is not None

    @property
    def format(self) -> BlockFormat:
        """Of the numbers as they are held: the file's, or float32 where its blocks would break."""
        stored = self.tensors[0].format
        return F32 if self.origin.moves_columns and stored.is_quantized else stored

    def check(self) -> None:
        """Raise WeightsError for NaN and infinity, or for a matrix of several types."""
        for info in self.tensors:
            self.checkpoint.check_finite(info.name)
        types = {info.format.name for info in self.tensors}
        if self.spec.is_packed and len(types) > 1:
            raise WeightsError(
                f"{self.checkpoint.path}: tensors {self.origin.name!r} have types {sorted(types)}, not one"
            )

    def read(self) -> Array:
        """The parameter's numbers in `format`, which is none with blocks; others than float32 as integers."""
        if self.format is F32:
            return self.read_float32()
        dtype = np.dtype(f"u{self.format.block_bytes}")
        return self.origin.read([self.checkpoint.data(i.name).view(dtype) for i in self.tensors], self.spec)

    def read_float32(self) -> FloatArray:
        """The parameter's numbers. Raises WeightsError where none stands for what the file has."""
        data, origin = self.checkpoint.data, self.origin
        tensors = [dequantize(data(info.name), info.format, info.shape) for info in self.tensors]
        with np.errstate(all="ignore"):
            values: FloatArray = origin.read(tensors, self.spec)
        if origin.encoding is not None and not np.isfinite(values).all():
            raise WeightsError(
                f"{self.checkpoint.path}: tensor {origin.name!r} has a number that means nothing there"
            )
        return values

    def release(self) -> None:
        """Drop the tensors' pages from memory."""
        for info in self.tensors:
            self.checkpoint.release(info.name)


def parameter_sources(model: Model, checkpoint: Checkpoint) -> dict[str, ParameterSource]:
    """Every parameter by its key, in the model's order.

    Raises WeightsError for the first that the checkpoint lacks, has in another shape or adds.
    """
    origins = model.origins(checkpoint)
    sources = {
        name: ParameterSource(spec, origins[name], _tensors(spec, origins[name], checkpoint), checkpoint)
        for name, spec in model.parameters().items()
    }
    used = {info.name for source in sources.values() for info in source.tensors}
    for name in checkpoint.tensors:
        if name not in used and not name.endswith(_DERIVED_TENSORS) and not model.ignores(name, checkpoint):
            raise WeightsError(f"{checkpoint.path}: tensor {name!r} is none of the model's")
    vocabulary = checkpoint.config_source.get("tokenizer.ggml.tokens", ())
    rows = sources["model.embed_tokens.weight"].spec.shape[0]
    if len(vocabulary) > rows:
        raise WeightsError(
            f"{checkpoint.path}: the vocabulary has {len(vocabulary)} tokens, but the embedding {rows} rows"
        )
    return sources


def _tensors(spec: ParameterSpec, origin: Origin, checkpoint: Checkpoint) -> tuple[TensorInfo, ...]:
    infos, shape = [], origin.shape_of(spec)
    for name in origin.names:
        info = checkpoint.tensors.get(name)
        if info is None:
            raise WeightsError(f"{checkpoint.path}: tensor {name!r} is missing")
        if _without_leading_ones(info.shape) != _without_leading_ones(shape):
            raise WeightsError(
                f"{checkpoint.path}: tensor {name!r} has shape {list(info.shape)}, not {list(shape)}"
            )
        infos.append(info)
    return tuple(infos)


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF writers may leave out axes of 1 at the front."""
    first = next((i for i, size in enumerate(shape) if size > 1), len(shape) - 1)
    return shape[first:]
