"""From a path to a model that runs: opens the checkpoint, packs its weights, records its program."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jinn import __version__, _native, env
from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.memory import available_memory, disk_speed, footprint
from jinn.engine.runner import NativeRunner, Programs, Runner
from jinn.models.generation import generation_defaults
from jinn.models.model import Model
from jinn.models.parameters import Node, Origin, ParameterSpec, tree
from jinn.models.registry import model_of
from jinn.ops.native import Recording, compile_program, fuse, record, record_hidden, record_predict
from jinn.ops.protocol import FloatArray
from jinn.sizes import format_size
from jinn.weights.checkpoint import Checkpoint, open_checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.packed import PackedFile, packed_key
from jinn.weights.quantize import dequantize

if TYPE_CHECKING:
    from jinn.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_SLOTS_PER_SEQUENCE = 16  # recurrent states: its own and snapshots
_SAMPLED_BYTES = 256  # of each end of a tensor
# Tensors that repeat another or the config: a tied head, rotary frequencies.
_DERIVED_TENSORS = ("lm_head.weight", "rotary_emb.inv_freq", "rope_freqs.weight")
_ELEMENTS = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}  # formats without blocks

Progress = Callable[[int, int], None]
"""Takes the bytes loaded so far, and all."""


def load_runner(config: EngineConfig, progress: Progress) -> tuple[Runner, ModelInfo]:
    """Load the model of `config` for the native kernels. Raises WeightsError or ConfigError, one line."""
    with open_checkpoint(config.model) as checkpoint:
        model = _model(checkpoint, config)
        pool = _native.ThreadPool(config.num_threads or _native.default_num_threads())
        kernels = _native.choose_kernels(env.isa() or "")
        check_tensors(model, checkpoint)
        folder, notes = _packed_folder(model, checkpoint, config)
        with open_packed_file(model, checkpoint, folder) if folder else nullcontext() as packed_file:
            parameters = load_parameters(model, checkpoint, pool, progress, packed_file)
        info = model_info(model, checkpoint, f"{kernels.name}-{config.activations}-{config.kv_cache_dtype}")
        info = replace(info, notes=(*info.notes, *notes))

    programs = _programs(model, tree(parameters), config, pool, kernels)
    cache, states = _caches(model, config)
    return NativeRunner(programs, cache, states, model.vocab_size), info


def _packed_folder(
    model: Model, checkpoint: Checkpoint, config: EngineConfig
) -> tuple[Path | None, tuple[str, ...]]:
    """Where to keep packed experts, and a note if that is because they do not fit into memory."""
    if config.packed_cache is not None:
        return Path(config.packed_cache), ()
    needed, available = footprint(model, checkpoint), available_memory()
    if not needed.experts or needed.fits(config.cache_memory, available):
        return None, ()
    folder = env.home() / "packed"
    read = needed.uncached_per_token(config.cache_memory, available)
    seconds = read / disk_speed(checkpoint.largest_file)
    note = (
        f"weights of {format_size(needed.weights)} and a cache of {format_size(config.cache_memory)} do not "
        f"fit into {format_size(available)} of memory: experts are read from {folder} as they are needed, "
        f"for a token about {format_size(read)}, which takes this disk {seconds:.2g} s"
    )
    logger.warning("%s", note)  # now: packing them takes minutes
    return folder, (note,)


def _model(checkpoint: Checkpoint, config: EngineConfig) -> Model:
    """With its prediction module only where that is to draft."""
    model = model_of(checkpoint)
    if config.speculative != "mtp":
        return model.without_prediction()
    if not model.has_mtp:
        raise WeightsError(f"{checkpoint.path}: has no multi-token prediction module to draft with")
    return model


def _programs(
    model: Model,
    parameters: Node,
    config: EngineConfig,
    pool: _native.ThreadPool,
    kernels: _native.Kernels,
) -> Programs:
    def compiled(recording: Recording) -> _native.Program:
        return compile_program(fuse(recording), pool, kernels)

    @cache
    def hidden_states() -> _native.Program:
        return compiled(record_hidden(model, parameters, config.activations))

    if config.speculative != "mtp":
        return Programs(compiled(record(model, parameters, config.activations)), hidden_states)
    return Programs(
        compiled(record(model, parameters, config.activations, keeps_hidden=True)),
        hidden_states,
        compiled(record_predict(model, parameters, config.activations)),
    )


def _caches(model: Model, config: EngineConfig) -> tuple[_native.KVCache, _native.StateCache | None]:
    """Blocks, and slots for models with recurrent states, that take `cache_memory` between them."""
    layers = [(s.num_kv_heads, s.key_dim, s.value_dim) for s in model.kv_specs()]
    block_bytes = _native.KVCache(layers, config.kv_cache_dtype, 1, config.block_size).block_bytes
    states = _state_cache(model, config)
    left = config.cache_memory
    if states:
        left -= states.num_slots * (states.slot_bytes + states.log_bytes)
    if left < block_bytes:
        raise WeightsError(f"cache_memory {left} is less than one block of {block_bytes} bytes")
    blocks = _native.KVCache(layers, config.kv_cache_dtype, left // block_bytes, config.block_size)
    return blocks, states


def _state_cache(model: Model, config: EngineConfig) -> _native.StateCache | None:
    """Slots in `state_memory`, but no more than sequences and snapshots would ever fill."""
    slot_bytes = state_slot_bytes(model, config.num_draft_tokens)
    if not slot_bytes:
        return None
    memory = config.cache_memory // 2 if config.state_memory is None else config.state_memory
    num_slots = min(memory // slot_bytes, _MAX_SLOTS_PER_SEQUENCE * config.max_num_seqs)
    if num_slots < 1:
        raise WeightsError(f"state_memory {memory} is less than one recurrent state of {slot_bytes} bytes")
    return _new_states(model, num_slots, config.num_draft_tokens)


def state_slot_bytes(model: Model, num_drafts: int) -> int:
    """What a sequence keeps in recurrent states and a log of drafts; 0 for models without."""
    if not model.state_specs():
        return 0
    one = _new_states(model, 1, num_drafts)
    return one.slot_bytes + one.log_bytes


def _new_states(model: Model, num_slots: int, num_drafts: int) -> _native.StateCache:
    layers = [
        (s.num_key_heads, s.num_value_heads, s.key_dim, s.value_dim, s.conv_kernel)
        for s in model.state_specs()
    ]
    num_kept_aside = max(num_drafts, 1)  # a prompt's last token is kept aside like a draft
    return _native.StateCache(layers, num_slots, num_kept_aside)


def load_parameters(
    model: Model,
    checkpoint: Checkpoint,
    pool: _native.ThreadPool,
    progress: Progress,
    packed_file: PackedFile | None = None,
) -> dict[str, Any]:
    """Every parameter by key: matrices packed, vectors as float32. Pages of the file are let go behind.

    With a `packed_file` of `open_packed_file`, the experts of mixtures are left there.
    """
    check_tensors(model, checkpoint)
    specs, origins = model.parameters(), model.origins(checkpoint)
    sizes = {name: origin_bytes(origin, checkpoint) for name, origin in origins.items()}
    loaded, parameters = 0, {}
    for name, spec in specs.items():
        if packed_file is None or not _is_expert(spec):
            parameters[name] = _load(checkpoint, spec, origins[name], pool)
        else:
            parameters[name] = _keep(checkpoint, name, spec, origins[name], pool, packed_file)
        loaded += sizes[name]
        progress(loaded, sum(sizes.values()))
    if packed_file is not None:
        packed_file.finish()
    return parameters


def open_packed_file(model: Model, checkpoint: Checkpoint, folder: Path) -> PackedFile:
    """The file in `folder` that keeps the packed experts of this checkpoint as it is now."""
    origins, stats = model.origins(checkpoint), map(os.stat, checkpoint.files)
    sizes = {
        name: _native.packed_experts_nbytes(_packed_format(checkpoint, origins[name]), *spec.shape)
        for name, spec in model.parameters().items()
        if _is_expert(spec)
    }
    versions = [(status.st_size, status.st_mtime_ns, status.st_ino) for status in stats]
    return PackedFile(folder, packed_key(_native.layout_id, fingerprint(checkpoint, ""), versions), sizes)


def _is_expert(spec: ParameterSpec) -> bool:
    return spec.num_experts_per_tok is not None


def _packed_format(checkpoint: Checkpoint, origin: Origin) -> str:
    """That of the file, or float32 where its blocks would break."""
    name = checkpoint.tensors[origin.names[0]].format.name
    return "F32" if origin.moves_columns and name not in _ELEMENTS else name


def _keep(
    checkpoint: Checkpoint,
    name: str,
    spec: ParameterSpec,
    origin: Origin,
    pool: _native.ThreadPool,
    packed_file: PackedFile,
) -> Any:
    """Experts that are read from the packed file, after they have been written to it where it is new."""
    place = str(packed_file.path), packed_file.offset(name)
    if not packed_file.is_whole:
        _load(checkpoint, spec, origin, pool, place)
    return _native.map_experts(place, _packed_format(checkpoint, origin), *spec.shape)


def origin_bytes(origin: Origin, checkpoint: Checkpoint) -> int:
    """Of all its tensors."""
    return sum(checkpoint.tensors[name].nbytes for name in origin.names)


def _load(
    checkpoint: Checkpoint,
    spec: ParameterSpec,
    origin: Origin,
    pool: _native.ThreadPool,
    place: tuple[str, int] | None = None,
) -> Any:
    for name in origin.names:
        checkpoint.check_finite(name)
    if not spec.is_packed:
        return read_float32(checkpoint, spec, origin)
    packed = _pack(checkpoint, spec, origin, pool, place)
    for name in origin.names:
        checkpoint.release(name)
    return packed


def read_float32(checkpoint: Checkpoint, spec: ParameterSpec, origin: Origin) -> FloatArray:
    """The parameter's numbers. Raises WeightsError where none stands for what the file has."""
    infos = [checkpoint.tensors[name] for name in origin.names]
    tensors = [dequantize(checkpoint.data(info.name), info.format, info.shape) for info in infos]
    with np.errstate(all="ignore"):
        values: FloatArray = origin.read(tensors, spec)
    if origin.encoding is not None and not np.isfinite(values).all():
        raise WeightsError(f"{checkpoint.path}: tensor {origin.name!r} has a number that means nothing there")
    return values


def read_moved_columns(
    checkpoint: Checkpoint, spec: ParameterSpec, origin: Origin
) -> tuple[npt.NDArray[Any], str]:
    """The parameter's numbers in the file's format, or in float32 where that has blocks, which break."""
    format_name = checkpoint.tensors[origin.name].format.name
    if format_name not in _ELEMENTS:
        return read_float32(checkpoint, spec, origin), "F32"
    tensors = [checkpoint.data(name).view(_ELEMENTS[format_name]) for name in origin.names]
    return origin.read(tensors, spec), format_name


def _pack(
    checkpoint: Checkpoint,
    spec: ParameterSpec,
    origin: Origin,
    pool: _native.ThreadPool,
    place: tuple[str, int] | None,
) -> Any:
    """A matrix, or one per expert; these at a place in a file, if there is one."""
    formats = {checkpoint.tensors[name].format.name for name in origin.names}
    if len(formats) > 1:
        raise WeightsError(
            f"{checkpoint.path}: tensors {origin.name!r} have types {sorted(formats)}, not one"
        )
    (format_name,) = formats
    *experts, rows, cols = spec.shape
    row_order = origin.rows
    if origin.moves_columns:
        values, format_name = read_moved_columns(checkpoint, spec, origin)
        sources, row_order = list(values.view(np.uint8).reshape(prod(experts), -1)), None
    elif experts and origin.num_experts is None:
        sources = list(checkpoint.data(origin.name).reshape(experts[0], -1))
    else:
        sources = [checkpoint.data(name) for name in origin.names]
    if not experts:
        (source,) = sources
        if row_order is not None and len(row_order) < origin.shape_of(spec)[0]:  # it has others' rows too
            source = source.reshape(origin.shape_of(spec)[0], -1)[row_order].reshape(-1)
            row_order = None
        return _native.pack(pool, source, format_name, rows, cols, row_order)
    return _native.pack_experts(pool, sources, format_name, rows, cols, row_order, place)


def check_tensors(model: Model, checkpoint: Checkpoint) -> None:
    """Raise WeightsError for the first parameter that the checkpoint lacks, has in another shape or adds."""
    specs, origins = model.parameters(), model.origins(checkpoint)
    used: set[str] = set()
    for parameter, spec in specs.items():
        origin = origins[parameter]
        shape = origin.shape_of(spec)
        for name in origin.names:
            info = checkpoint.tensors.get(name)
            if info is None:
                raise WeightsError(f"{checkpoint.path}: tensor {name!r} is missing")
            if _without_leading_ones(info.shape) != _without_leading_ones(shape):
                raise WeightsError(
                    f"{checkpoint.path}: tensor {name!r} has shape {list(info.shape)}, not {list(shape)}"
                )
        used.update(origin.names)
    for name in checkpoint.tensors:
        if name not in used and not name.endswith(_DERIVED_TENSORS) and not model.ignores(name, checkpoint):
            raise WeightsError(f"{checkpoint.path}: tensor {name!r} is none of the model's")
    vocabulary = checkpoint.config_source.get("tokenizer.ggml.tokens", ())
    rows = specs["model.embed_tokens.weight"].shape[0]
    if len(vocabulary) > rows:
        raise WeightsError(
            f"{checkpoint.path}: the vocabulary has {len(vocabulary)} tokens, but the embedding {rows} rows"
        )


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF writers may leave out axes of 1 at the front."""
    first = next((i for i, size in enumerate(shape) if size > 1), len(shape) - 1)
    return shape[first:]


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
    return f"jinn-{__version__}-{arithmetic}-{digest.hexdigest()[:16]}"
