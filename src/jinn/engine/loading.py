"""From a path to a model that runs: opens the checkpoint, packs its weights, records its program."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from jinn import __version__, _native, env
from jinn.engine.adapters import adapter_parameters, digests, read_adapters
from jinn.engine.config import Activations, EngineConfig, ModelInfo
from jinn.engine.memory import available_memory, disk_speed, footprint
from jinn.engine.runner import NativeRunner, Programs
from jinn.models.generation import generation_defaults
from jinn.models.model import Model
from jinn.models.parameters import Node, tree
from jinn.models.registry import model_of
from jinn.models.sources import ParameterSource, parameter_sources
from jinn.ops.native import Recording, compile_program, fuse, record, record_hidden, record_predict
from jinn.ops.protocol import FloatArray, IntArray
from jinn.sizes import format_size
from jinn.weights.checkpoint import Checkpoint, open_checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.lora import LoraAdapter
from jinn.weights.packed import PackedFile, packed_folder, packed_key, packed_path

if TYPE_CHECKING:
    from jinn.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_SLOTS_PER_SEQUENCE = 16  # recurrent states: its own and snapshots
_SAMPLED_BYTES = 256  # of each end of a tensor

Progress = Callable[[int, int], None]
"""Takes the bytes loaded so far, and all."""


def load_runner(config: EngineConfig, progress: Progress) -> tuple[NativeRunner, ModelInfo]:
    """Load the model of `config` for the native kernels. Raises WeightsError or ConfigError, one line."""
    with open_checkpoint(config.model) as checkpoint:
        model = _model(checkpoint, config)
        pool = _native.ThreadPool(config.num_threads or _native.default_num_threads())
        kernels = _native.choose_kernels(env.isa() or "")
        config = replace(config, activations=resolved_activations(config, kernels))
        sources = parameter_sources(model, checkpoint)
        adapters = read_adapters(model, config.lora_adapters)
        packed_file, notes = _packed_file(sources, adapters.values(), checkpoint, config)
        with packed_file or nullcontext():
            if config.verify and packed_file is not None and packed_file.is_whole:
                packed_file.verify()
            parameters = load_parameters(sources, pool, progress, packed_file)
        parameters.update(adapter_parameters(model, list(adapters.values()), partial(_pack_float32, pool)))
        info = model_info(model, checkpoint, f"{kernels.name}-{config.activations}-{config.kv_cache_dtype}")
        info = replace(info, notes=(*info.notes, *notes), adapters=digests(adapters))

    programs = _programs(model, tree(parameters), config, pool, kernels)
    cache, states = _caches(model, config)
    return NativeRunner(programs, cache, states, model.vocab_size), info


def resolved_activations(config: EngineConfig, kernels: _native.Kernels) -> Activations:
    """What "auto" stands for: AMX multiplies 12 bits nearly as fast as 8, other kernels half as fast."""
    if config.activations != "auto":
        return config.activations
    return "int12" if kernels.name == "amx" else "mixed"


def _packed_file(
    sources: Mapping[str, ParameterSource],
    adapters: Iterable[LoraAdapter],
    checkpoint: Checkpoint,
    config: EngineConfig,
) -> tuple[PackedFile | None, tuple[str, ...]]:
    """Where to keep packed weights, and a note if that is because experts do not fit into memory."""
    if config.packed_cache is not None:
        matrices = {name: source for name, source in sources.items() if source.spec.is_packed}
        return open_packed_file(matrices, checkpoint, Path(config.packed_cache)), ()
    needed, available = footprint(sources.values(), adapters), available_memory()
    if not needed.experts or needed.fits(config.cache_memory, available):
        return None, ()
    folder = packed_folder()
    read = needed.uncached_per_token(config.cache_memory, available)
    seconds = read / disk_speed(checkpoint.largest_file)
    note = (
        f"weights of {format_size(needed.weights)} and a cache of {format_size(config.cache_memory)} do not "
        f"fit into {format_size(available)} of memory: experts are read from {folder} as they are needed, "
        f"for a token about {format_size(read)}, which takes this disk {seconds:.2g} s"
    )
    logger.warning("%s", note)  # now: packing them takes minutes
    experts = {name: source for name, source in sources.items() if source.is_expert}
    return open_packed_file(experts, checkpoint, folder), (note,)


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
    sources: Mapping[str, ParameterSource],
    pool: _native.ThreadPool,
    progress: Progress,
    packed_file: PackedFile | None = None,
) -> dict[str, Any]:
    """Every parameter by key: matrices packed, vectors as float32. Pages of the file are let go behind.

    With a `packed_file` of `open_packed_file`, the parameters that it holds are left there.
    """
    total = sum(source.nbytes for source in sources.values())
    loaded, parameters = 0, {}
    for name, source in sources.items():
        if packed_file is None or name not in packed_file:
            parameters[name] = _load(source, pool)
        else:
            parameters[name] = _keep(name, source, pool, packed_file)
        loaded += source.nbytes
        progress(loaded, total)
    if packed_file is not None:
        packed_file.finish()
    return parameters


def open_packed_file(
    sources: Mapping[str, ParameterSource], checkpoint: Checkpoint, folder: Path
) -> PackedFile:
    """The file in `folder` that keeps these parameters, packed, of the checkpoint as it is now."""
    sizes = {}
    for name, source in sources.items():
        *experts, rows, cols = source.spec.shape
        sizes[name] = _native.packed_nbytes(source.format.name, prod(experts), rows, cols)
    stats = map(os.stat, checkpoint.files)
    versions = [(status.st_size, status.st_mtime_ns, status.st_ino) for status in stats]
    key = packed_key(_native.layout_id, fingerprint(checkpoint, ""), versions)
    return PackedFile(packed_path(folder, checkpoint.path, sizes), key, sizes)


def _keep(name: str, source: ParameterSource, pool: _native.ThreadPool, packed_file: PackedFile) -> Any:
    """What is read from the packed file, after it has been written to it where that is new."""
    place = str(packed_file.path), packed_file.offset(name)
    if not packed_file.is_whole:
        _load(source, pool, place)
        packed_file.seal(name)
    map_weights = _native.map_experts if len(source.spec.shape) > 2 else _native.map_packed
    return map_weights(place, source.format.name, *source.spec.shape)


def _load(source: ParameterSource, pool: _native.ThreadPool, place: tuple[str, int] | None = None) -> Any:
    """A vector, a packed matrix, or one for each expert; matrices at a place in a file, if there is one."""
    source.check()
    if not source.spec.is_packed:
        return source.read_float32()
    *experts, rows, cols = source.spec.shape
    matrices, row_order = _matrices(source)
    arguments = source.format.name, rows, cols, row_order, place, _is_mapped(matrices[0])
    packed: Any
    if experts:
        packed = _native.pack_experts(pool, matrices, *arguments)
    else:
        packed = _native.pack(pool, matrices[0], *arguments)
    source.release()
    return packed


def _pack_float32(pool: _native.ThreadPool, matrix: FloatArray) -> _native.PackedTensor:
    return _native.pack(pool, matrix.view(np.uint8).reshape(-1), "F32", *matrix.shape)


def _is_mapped(data: npt.NDArray[np.uint8]) -> bool:
    """Whether the bytes are a file's, which can be read again, rather than memory of their own."""
    owner: Any = data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner is not None


def _matrices(source: ParameterSource) -> tuple[list[npt.NDArray[np.uint8]], IntArray | None]:
    """The bytes of each matrix in `source.format`, and which of its rows to take (None: all, in order)."""
    spec, origin, data = source.spec, source.origin, source.checkpoint.data
    num_matrices = prod(spec.shape[:-2])
    if origin.moves_columns:
        return list(source.read().view(np.uint8).reshape(num_matrices, -1)), None
    if origin.num_experts is not None:
        return [data(info.name) for info in source.tensors], origin.rows
    matrices = list(data(origin.name).reshape(num_matrices, -1))
    num_stored_rows = origin.shape_of(spec)[-2]
    if len(spec.shape) > 2 or origin.rows is None or len(origin.rows) == num_stored_rows:
        return matrices, origin.rows
    (stored,) = matrices  # it has others' rows too
    return [stored.reshape(num_stored_rows, -1)[origin.rows].reshape(-1)], None


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
