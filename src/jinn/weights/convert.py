"""Converts a model between GGUF and Hugging Face's folders, and to smaller types, a few megabytes at a time.

A file of the other kind is described by the model: `origins` says where each parameter is in the file that is
read, and where it goes in one that is to be written. Between files of one kind, tensors keep their names.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from jinn.models.config import config_of
from jinn.models.decoder import Decoder
from jinn.models.parameters import NewFile, Origin, ParameterSpec
from jinn.models.registry import model_of
from jinn.models.sources import parameter_sources
from jinn.weights.atomic import atomic_output, check_absent
from jinn.weights.block_formats import F32, BlockFormat
from jinn.weights.checkpoint import Checkpoint, open_checkpoint
from jinn.weights.config_files import gguf_metadata, hf_config, hf_generation_config, rope_divisors
from jinn.weights.converted_tensor import ConvertedTensor, TensorReport
from jinn.weights.errors import WeightsError
from jinn.weights.family_files import files_of
from jinn.weights.file_types import (
    FOLDER_TYPES,
    GGUF_TYPES,
    TORCH_DTYPES,
    file_type,
    folder_type,
    gguf_type,
    main_folder_type,
    wanted_type,
)
from jinn.weights.gguf import MetadataValue
from jinn.weights.gguf_writer import write_gguf
from jinn.weights.model_folder import write_json
from jinn.weights.output import OutputTensor, Progress
from jinn.weights.quantize import quantize
from jinn.weights.rearrange import Assembly, Piece, StoredParameter
from jinn.weights.safetensors_writer import write_safetensors
from jinn.weights.tensors import TensorInfo
from jinn.weights.tokenizer_files import gguf_tokenizer, hf_tokenizer

_TYPE_FIELDS = ("dtype", "torch_dtype", "quantization_config")  # FP8 is no longer what it was
_COPIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written: path, bytes of tensors, what became of each, and parameters that were left out."""

    path: Path
    num_bytes: int
    tensors: tuple[TensorReport, ...]
    left_out: tuple[str, ...]


def convert(
    source: Path,
    target: Path,
    type_name: str | None = None,
    *,
    overwrite: bool = False,
    num_threads: int = 1,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Write the model at `source` to `target`: a GGUF file where its name ends so, or else a folder.

    `type_name` is for the matrices: one of GGUF_TYPES, or for a folder of FOLDER_TYPES. Without it they keep
    theirs, or become BF16 where a folder cannot hold it. Raises WeightsError, ConfigError, ValueError.
    """
    kind: Literal["gguf", "hf"] = "gguf" if target.suffix == ".gguf" else "hf"
    wanted = None
    if type_name is not None:
        wanted = wanted_type(type_name, GGUF_TYPES if kind == "gguf" else FOLDER_TYPES)
    check_absent(target, overwrite=overwrite)
    if target.exists() and target.samefile(source):
        raise WeightsError(f"{target}: is the model to convert; choose another name")
    with open_checkpoint(source) as checkpoint, ThreadPoolExecutor(num_threads) as pool:
        left_out = _left_out(checkpoint, kind)
        assemblies = _assemblies(checkpoint, kind, left_out)
        largest = max(assemblies, key=lambda assembly: prod(assembly.shape)).source_format
        types = (
            _gguf_types(assemblies, wanted) if kind == "gguf" else _folder_types(assemblies, wanted, largest)
        )
        converted = [ConvertedTensor(*pair) for pair in zip(assemblies, types, strict=True)]
        tensors = [tensor.output(pool, num_threads) for tensor in converted]
        if kind == "gguf":
            tensors += _derived_tensors(checkpoint)
        size = sum(tensor.nbytes for tensor in tensors)
        with atomic_output(target, size, overwrite=overwrite) as path:
            if kind == "gguf":
                write_gguf(path, _metadata(checkpoint, wanted or largest), tensors, progress)
            else:
                path.mkdir()
                _write_files(path, checkpoint, main_folder_type(largest, wanted))
                write_safetensors(path, tensors, progress)
    return Conversion(target, size, tuple(tensor.report() for tensor in converted), left_out)


def _left_out(checkpoint: Checkpoint, kind: Literal["gguf", "hf"]) -> tuple[str, ...]:
    """Parameters that a file of this kind has no place for: a prediction module's in most GGUF files."""
    if checkpoint.kind == kind or kind == "hf":
        return ()
    model = decoder_of(checkpoint)
    if files_of(model).has_gguf_prediction:
        return ()
    return tuple(name for name in model.parameters() if name.startswith("mtp."))


def _assemblies(
    checkpoint: Checkpoint, kind: Literal["gguf", "hf"], left_out: Sequence[str]
) -> list[Assembly]:
    """Every tensor to be written, but those that GGUF derives from the config."""
    if checkpoint.kind == kind:
        return [_unchanged(checkpoint, info) for info in checkpoint.tensors.values()]
    model = decoder_of(checkpoint)
    sources, places = parameter_sources(model, checkpoint), model.origins(NewFile(kind))
    pieces: dict[str, list[Piece]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in model.parameters().items():
        if name in left_out:
            continue
        parameter, place = StoredParameter(checkpoint, spec, sources[name].origin), places[name]
        for number, tensor in enumerate(place.names):
            pieces.setdefault(tensor, []).append(Piece(parameter, place, number))
            shapes[tensor] = place.shape_of(spec)
    return [Assembly(name, shapes[name], parts) for name, parts in pieces.items()]


def decoder_of(checkpoint: Checkpoint) -> Decoder:
    """The model. Raises WeightsError, ConfigError where it cannot be converted."""
    model = model_of(checkpoint)
    if not isinstance(model, Decoder):
        raise WeightsError(f"{checkpoint.path}: models of family {model.family!r} cannot be converted")
    return model


def _unchanged(checkpoint: Checkpoint, info: TensorInfo) -> Assembly:
    origin, shape = Origin(info.name), info.shape or (1,)
    return Assembly(
        info.name, info.shape, [Piece(StoredParameter(checkpoint, ParameterSpec(shape), origin), origin)]
    )


def _gguf_types(assemblies: Sequence[Assembly], wanted: BlockFormat | None) -> list[BlockFormat]:
    return [gguf_type(a.name, a.shape, a.source_format, wanted) for a in assemblies]


def _folder_types(
    assemblies: Sequence[Assembly], wanted: BlockFormat | None, largest: BlockFormat
) -> list[BlockFormat]:
    main = main_folder_type(largest, wanted)
    types = []
    for assembly in assemblies:
        chosen, must_be_exact = folder_type(len(assembly.shape), assembly.source_format, wanted, main)
        is_held = not must_be_exact or ConvertedTensor(assembly, chosen).is_exact()
        types.append(chosen if is_held else F32)
    return types


def _derived_tensors(checkpoint: Checkpoint) -> list[OutputTensor]:
    """Llama 3's rotary scaling, for which GGUF has no keys."""
    if checkpoint.kind == "gguf":
        return []
    divisors = rope_divisors(checkpoint, decoder_of(checkpoint))
    if divisors is None:
        return []
    return [OutputTensor("rope_freqs.weight", F32, divisors.shape, lambda: iter([quantize(divisors, F32)]))]


def _metadata(checkpoint: Checkpoint, matrices: BlockFormat) -> dict[str, MetadataValue]:
    """GGUF's keys for a file whose matrices have this type."""
    if checkpoint.kind == "gguf":
        metadata = {
            key: value for key, value in checkpoint.config_source.items() if not key.startswith("split.")
        }
        metadata.pop("general.alignment", None)
    else:
        model = decoder_of(checkpoint)
        name = checkpoint.path.resolve().name
        metadata = gguf_metadata(name, model, config_of(checkpoint), checkpoint.generation_config)
        if (checkpoint.path / "tokenizer.json").exists():
            metadata |= gguf_tokenizer(checkpoint.path, model.vocab_size)
    metadata["general.file_type"] = file_type(matrices)
    return metadata


def _write_files(folder: Path, checkpoint: Checkpoint, matrices: BlockFormat) -> None:
    """Everything in a model's folder but the tensors, most of which have this type."""
    dtype = TORCH_DTYPES[matrices.name]
    if checkpoint.kind == "hf":
        for name in _COPIED_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        config = {key: value for key, value in checkpoint.config_source.items() if key not in _TYPE_FIELDS}
        write_json(folder / "config.json", {**config, "torch_dtype": dtype})
        return
    metadata = checkpoint.config_source
    write_json(folder / "config.json", hf_config(checkpoint, decoder_of(checkpoint), dtype))
    write_json(folder / "generation_config.json", hf_generation_config(checkpoint))
    if "tokenizer.ggml.tokens" in metadata:
        for name, content in hf_tokenizer(metadata).items():
            write_json(folder / name, content)
