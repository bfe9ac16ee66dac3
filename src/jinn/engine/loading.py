"""From a path to a model that runs: opens the checkpoint, packs its weights, records its program."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jinn import _native, env
from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.runner import NativeRunner, Runner
from jinn.models.generation import generation_defaults
from jinn.models.model import Model
from jinn.models.parameters import Origin, ParameterSpec, tree
from jinn.models.registry import model_of
from jinn.ops.native import Record, compile_program, fuse, record, record_hidden_rows
from jinn.weights.checkpoint import Checkpoint, open_checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.quantize import dequantize

if TYPE_CHECKING:
    from jinn.text.tokenizer import Tokenizer

_SAMPLED_BYTES = 256  # of each end of a tensor
# Tensors that repeat another or the config: a tied head, rotary frequencies.
_DERIVED_TENSORS = ("lm_head.weight", "rotary_emb.inv_freq", "rope_freqs.weight")

Progress = Callable[[int, int], None]
"""Takes the bytes loaded so far, and all."""


def load_runner(config: EngineConfig, progress: Progress) -> tuple[Runner, ModelInfo]:
    """Load the model of `config` for the native kernels. Raises WeightsError or ConfigError, one line."""
    with open_checkpoint(config.model) as checkpoint:
        model = model_of(checkpoint)
        pool = _native.ThreadPool(config.num_threads or _native.default_num_threads())
        kernels = _native.choose_kernels(env.isa() or "")
        parameters = load_parameters(model, checkpoint, pool, progress)
        info = model_info(model, checkpoint, f"{kernels.name}-{config.activations}-{config.kv_cache_dtype}")

    def program_of(record: Record) -> _native.Program:
        return compile_program(fuse(record(model, tree(parameters), config.activations)), pool, kernels)

    program = program_of(record)
    layers = [(s.num_kv_heads, s.key_dim, s.value_dim) for s in model.kv_specs()]
    block_bytes = _native.KVCache(layers, config.kv_cache_dtype, 1, config.block_size).block_bytes
    num_blocks = config.cache_memory // block_bytes
    if num_blocks < 1:
        raise WeightsError(
            f"cache_memory {config.cache_memory} is less than one block of {block_bytes} bytes"
        )
    cache = _native.KVCache(layers, config.kv_cache_dtype, num_blocks, config.block_size)
    return NativeRunner(program, cache, model.vocab_size, lambda: program_of(record_hidden_rows)), info


def load_parameters(
    model: Model, checkpoint: Checkpoint, pool: _native.ThreadPool, progress: Progress
) -> dict[str, Any]:
    """Every parameter by key: matrices packed, vectors as float32. Pages of the file are let go behind."""
    specs, origins = model.parameters(), model.origins(checkpoint)
    check_tensors(specs, origins, checkpoint)
    sizes = {name: origin_bytes(origin, checkpoint) for name, origin in origins.items()}
    loaded, parameters = 0, {}
    for name, spec in specs.items():
        parameters[name] = _load(checkpoint, spec, origins[name], pool)
        loaded += sizes[name]
        progress(loaded, sum(sizes.values()))
    return parameters


def origin_bytes(origin: Origin, checkpoint: Checkpoint) -> int:
    """Of all its tensors."""
    return sum(checkpoint.tensors[name].nbytes for name in origin.names)


def _load(checkpoint: Checkpoint, spec: ParameterSpec, origin: Origin, pool: _native.ThreadPool) -> Any:
    for name in origin.names:
        checkpoint.check_finite(name)
    if len(spec.shape) == 1:
        info = checkpoint.tensors[origin.name]
        values = dequantize(checkpoint.data(origin.name), info.format, info.shape)
        return np.ascontiguousarray(values if origin.row_order is None else values[origin.row_order])
    packed = _pack(checkpoint, spec, origin, pool)
    for name in origin.names:
        checkpoint.release(name)
    return packed


def _pack(checkpoint: Checkpoint, spec: ParameterSpec, origin: Origin, pool: _native.ThreadPool) -> Any:
    """A matrix, or one per expert."""
    formats = {checkpoint.tensors[name].format.name for name in origin.names}
    if len(formats) > 1:
        raise WeightsError(
            f"{checkpoint.path}: tensors {origin.name!r} have types {sorted(formats)}, not one"
        )
    (format_name,) = formats
    *experts, rows, cols = spec.shape
    if not experts:
        return _native.pack(pool, checkpoint.data(origin.name), format_name, rows, cols, origin.row_order)
    if origin.num_experts is None:
        sources = list(checkpoint.data(origin.name).reshape(experts[0], -1))
    else:
        sources = [checkpoint.data(name) for name in origin.names]
    return _native.pack_experts(pool, sources, format_name, rows, cols, origin.row_order)


def check_tensors(
    specs: Mapping[str, ParameterSpec], origins: Mapping[str, Origin], checkpoint: Checkpoint
) -> None:
    """Raise WeightsError for the first parameter that the checkpoint lacks, has in another shape or adds."""
    used: set[str] = set()
    for parameter, spec in specs.items():
        origin = origins[parameter]
        shape = origin.shape_of(spec)
        for name in origin.names:
            info = checkpoint.tensors.get(name)
            if info is None:
                raise WeightsError(f"{checkpoint.path}: tensor {name!r} is missing")
            if info.shape != shape:
                raise WeightsError(
                    f"{checkpoint.path}: tensor {name!r} has shape {list(info.shape)}, not {list(shape)}"
                )
        used.update(origin.names)
    for name in checkpoint.tensors:
        if name not in used and not name.endswith(_DERIVED_TENSORS):
            raise WeightsError(f"{checkpoint.path}: tensor {name!r} is none of the model's")
    vocabulary = checkpoint.config_source.get("tokenizer.ggml.tokens", ())
    rows = specs["model.embed_tokens.weight"].shape[0]
    if len(vocabulary) > rows:
        raise WeightsError(
            f"{checkpoint.path}: the vocabulary has {len(vocabulary)} tokens, but the embedding {rows} rows"
        )


def model_info(model: Model, checkpoint: Checkpoint, arithmetic: str) -> ModelInfo:
    """What the engine needs to know besides the runner."""
    defaults = generation_defaults(checkpoint)
    return ModelInfo(
        model.max_position_embeddings,
        defaults.eos_token_ids,
        fingerprint(checkpoint, arithmetic),
        load_tokenizer=partial(_load_tokenizer, checkpoint.path),
    )


def _load_tokenizer(path: Path) -> Tokenizer:
    from jinn.frontend import load_tokenizer

    return load_tokenizer(path)


def fingerprint(checkpoint: Checkpoint, arithmetic: str) -> str:
    """Names what an answer's bytes depend on: the weights, the build, the instruction set and the precisions.

    The weights enter by their tensors' names, shapes, types and places and both ends of their data, since
    reading all of it would cost seconds.
    """
    digest = hashlib.sha256()
    for info in checkpoint.tensors.values():
        data = checkpoint.data(info.name)
        digest.update(f"{info.name} {info.format.name} {info.shape} {info.offset}\n".encode())
        digest.update(data[:_SAMPLED_BYTES].tobytes() + data[-_SAMPLED_BYTES:].tobytes())
    return f"jinn-{metadata.version('jinn')}-{arithmetic}-{digest.hexdigest()[:16]}"
