"""Runs a model with the definition of each op, in torch and float32: slow, and the measure of the kernels.

Needs torch, so nothing imports this module unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.loading import Progress, check_tensors, model_info, origin_bytes
from jinn.engine.runner import Runner
from jinn.engine.sampler import SampledToken, SampleRow, sample
from jinn.models.model import Model
from jinn.models.parameters import Origin, tree
from jinn.models.registry import model_of
from jinn.ops.protocol import Batch, Context
from jinn.ops.reference import PagedCache, ReferenceOps, tensor_batch
from jinn.weights.checkpoint import Checkpoint, open_checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.quantize import dequantize


class ReferenceRunner:
    """`Runner` over `ReferenceOps` and a `PagedCache`; draws with the plain `sample`.

    `parameters` are torch tensors by checkpoint key, those of linears with a `format`.
    """

    def __init__(
        self, model: Model, parameters: Mapping[str, Any], ops: ReferenceOps, cache: PagedCache
    ) -> None:
        self._model, self._parameters = model, tree(parameters)
        self._ops, self._cache = ops, cache
        self.vocab_size = model.vocab_size
        self.num_blocks = cache.num_blocks
        self.block_size = cache.block_size

    def step(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
        """See `Runner`."""
        return [sample(logits, row) for logits, row in zip(self.logits(batch), rows, strict=True)]

    def logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        return self._compute(self._model.forward, batch)

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        return self._compute(self._hidden_rows, batch)

    def _hidden_rows(self, ops: ReferenceOps, parameters: Any, ctx: Context) -> torch.Tensor:
        return ops.select_rows(self._model.hidden(ops, parameters, ctx), ctx)

    def _compute(self, forward: Callable[..., torch.Tensor], batch: Batch) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            output = forward(self._ops, self._parameters, Context(tensor_batch(batch), self._cache))
        values: npt.NDArray[np.float32] = output.numpy()
        return values

    def copy_block(self, source: int, target: int) -> None:
        """See `Runner`."""
        self._cache.copy_block(source, target)


def load_reference_runner(config: EngineConfig, progress: Progress) -> tuple[Runner, ModelInfo]:
    """Load the model of `config` for torch. Raises WeightsError or ConfigError, one line each.

    `num_threads` is torch's, which has one number for the whole process. The cache is float32 whatever it
    rounds to, so `cache_memory` holds fewer blocks than native code would get out of it.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with open_checkpoint(config.model) as checkpoint:
        model = model_of(checkpoint)
        parameters = load_tensors(model, checkpoint, progress)
        info = model_info(model, checkpoint, "reference")
    cache = PagedCache(model.kv_specs(), config.kv_cache_dtype, _num_blocks(model, config), config.block_size)
    return ReferenceRunner(model, parameters, ReferenceOps(config.activations), cache), info


def load_tensors(model: Model, checkpoint: Checkpoint, progress: Progress) -> dict[str, torch.Tensor]:
    """Every parameter by key, dequantized to float32, with its file's format as `.format`."""
    specs, origins = model.parameters(), model.origins(checkpoint)
    check_tensors(specs, origins, checkpoint)
    sizes = {name: origin_bytes(origin, checkpoint) for name, origin in origins.items()}
    loaded, parameters = 0, {}
    for name in specs:
        parameters[name] = _load(checkpoint, origins[name])
        loaded += sizes[name]
        progress(loaded, sum(sizes.values()))
    return parameters


def _load(checkpoint: Checkpoint, origin: Origin) -> torch.Tensor:
    parts = []
    for name in origin.names:
        info = checkpoint.tensors[name]
        checkpoint.check_finite(name)
        parts.append(dequantize(checkpoint.data(name), info.format, info.shape))
    values = parts[0] if origin.num_experts is None else np.stack(parts)
    if origin.row_order is not None:
        values = values.take(origin.row_order, axis=max(values.ndim - 2, 0))
    tensor: Any = torch.from_numpy(values)
    tensor.format = info.format.name
    parameter: torch.Tensor = tensor
    return parameter


def _num_blocks(model: Model, config: EngineConfig) -> int:
    floats = sum(spec.num_kv_heads * (spec.key_dim + spec.value_dim) for spec in model.kv_specs())
    block_bytes = 4 * floats * config.block_size
    if config.cache_memory < block_bytes:
        raise WeightsError(
            f"cache_memory {config.cache_memory} is less than one block of {block_bytes} bytes"
        )
    return config.cache_memory // block_bytes
