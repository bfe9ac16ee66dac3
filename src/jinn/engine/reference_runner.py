"""Runs a model with the definition of each op, in torch and float32: slow, and the measure of the kernels.

Needs torch, so nothing imports this module unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from jinn import _native, env
from jinn.engine.adapters import adapter_parameters, digests, read_adapters
from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.loading import Progress, model_info, resolved_activations
from jinn.engine.runner import Runner
from jinn.engine.sampler import SampledToken, SampleRow, sample
from jinn.models.model import Model
from jinn.models.parameters import tree
from jinn.models.registry import model_of
from jinn.models.sources import parameter_sources
from jinn.ops.protocol import Batch, Context
from jinn.ops.reference import PagedCache, ReferenceOps, tensor_batch
from jinn.weights.checkpoint import Checkpoint, open_checkpoint
from jinn.weights.errors import WeightsError

_NUM_STATE_SLOTS = 1024  # made when they are first written


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
        self.num_state_slots = _NUM_STATE_SLOTS if model.state_specs() else 0
        self._last_hidden = torch.empty(0, 0)

    def step(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
        """See `Runner`."""
        return [sample(logits, row) for logits, row in zip(self.logits(batch), rows, strict=True)]

    def logits(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        return self._logits(self._model.hidden, batch)

    def hidden_states(self, batch: Batch) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        self.logits(batch)
        return self.last_hidden()[batch.logit_rows]

    def predict(self, batch: Batch, rows: Sequence[SampleRow]) -> Sequence[SampledToken]:
        """See `Runner`."""
        logits = self._logits(self._model.predict, batch)
        return [sample(line, row) for line, row in zip(logits, rows, strict=True)]

    def last_hidden(self) -> npt.NDArray[np.float32]:
        """See `Runner`."""
        values: npt.NDArray[np.float32] = self._last_hidden.numpy()
        return values

    def copy_block(self, source: int, target: int) -> None:
        """See `Runner`."""
        self._cache.copy_block(source, target)

    def copy_state(self, source: int, target: int) -> None:
        """See `Runner`."""
        self._cache.states.copy_slot(source, target)

    def _logits(self, hidden: Callable[..., torch.Tensor], batch: Batch) -> npt.NDArray[np.float32]:
        """Logits of what `hidden` of the model computes, which `last_hidden` keeps."""
        context = Context(tensor_batch(batch), self._cache)
        with torch.no_grad():
            self._last_hidden = hidden(self._ops, self._parameters, context)
            logits = self._model.head(self._ops, self._parameters, self._last_hidden, context)
        values: npt.NDArray[np.float32] = logits.numpy()
        return values


def load_reference_runner(config: EngineConfig, progress: Progress) -> tuple[Runner, ModelInfo]:
    """Load the model of `config` for torch. Raises WeightsError or ConfigError, one line each.

    `num_threads` is torch's, which has one number for the whole process. The cache is float32 whatever it
    rounds to, so `cache_memory` holds fewer blocks than native code would get out of it.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    activations = resolved_activations(config, _native.choose_kernels(env.isa() or ""))
    with open_checkpoint(config.model) as checkpoint:
        model = model_of(checkpoint)
        if config.speculative != "mtp":
            model = model.without_prediction()
        adapters = read_adapters(model, config.lora_adapters)
        parameters: dict[str, Any] = {**load_tensors(model, checkpoint, progress)}
        parameters.update(adapter_parameters(model, list(adapters.values()), torch.from_numpy))
        info = replace(
            model_info(model, checkpoint, f"reference-{activations}-{config.kv_cache_dtype}"),
            adapters=digests(adapters),
        )
    cache = PagedCache(model.kv_specs(), config.kv_cache_dtype, _num_blocks(model, config), config.block_size)
    return ReferenceRunner(model, parameters, ReferenceOps(activations), cache), info


def load_tensors(model: Model, checkpoint: Checkpoint, progress: Progress) -> dict[str, torch.Tensor]:
    """Every parameter by key, dequantized to float32, with the format that its numbers had as `.format`."""
    sources = parameter_sources(model, checkpoint)
    total = sum(source.nbytes for source in sources.values())
    loaded, parameters = 0, {}
    for name, source in sources.items():
        source.check()
        tensor: Any = torch.from_numpy(source.read_float32())
        tensor.format = source.format.name
        parameters[name] = tensor
        loaded += source.nbytes
        progress(loaded, total)
    return parameters


def _num_blocks(model: Model, config: EngineConfig) -> int:
    floats = sum(spec.num_kv_heads * (spec.key_dim + spec.value_dim) for spec in model.kv_specs())
    block_bytes = 4 * floats * config.block_size
    if config.cache_memory < block_bytes:
        raise WeightsError(
            f"cache_memory {config.cache_memory} is less than one block of {block_bytes} bytes"
        )
    return config.cache_memory // block_bytes
