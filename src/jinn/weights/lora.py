"""Reads a LoRA adapter as PEFT saves it: a folder with adapter_config.json and adapter_model.safetensors.

A linear with weight W [out, in] becomes `W x + scale * B (A x)` with A [rank, in] and B [out, rank]
(arXiv 2106.09685). The scale is alpha / rank, of rank-stabilized adapters alpha / sqrt(rank) (2312.03732).
A setting that means more than that is refused by name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jinn.ops.protocol import FloatArray
from jinn.weights.errors import WeightsError, quoted
from jinn.weights.finite_check import check_finite
from jinn.weights.model_folder import file_in, read_json
from jinn.weights.quantize import dequantize
from jinn.weights.safetensors import SafetensorsFile

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RANK = 8192

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_PLAIN_PATTERN = re.compile(r"\^?([\w.-]|\\\.)+\$?")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

_READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "layers_to_transform",
}  # fmt: skip
# What only training, another runtime or a reader needs.
_WITHOUT_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "inference_mode", "exclude_modules", "lora_dropout", "layers_pattern", "megatron_config", "megatron_core",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size", "init_lora_weights",
}  # fmt: skip
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base model's weights


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """What the adapter adds to one linear: `b @ (a @ x)`."""

    a: FloatArray  # [rank, in]
    b: FloatArray  # [out, rank], times the scale


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter's linears by the names of Hugging Face's modules, such as model.layers.0.mlp.up_proj."""

    path: Path
    linears: Mapping[str, LoraLinear]
    digest: str  # names the numbers

    @property
    def nbytes(self) -> int:
        """In memory, in float32."""
        return sum(linear.a.nbytes + linear.b.nbytes for linear in self.linears.values())


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What adapter_config.json says of ranks, scales and targets."""

    rank: int
    alpha: float
    is_rank_stabilized: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: tuple[str, ...] | None  # ends of their names; None: a pattern, which is not matched
    layers: frozenset[int] | None  # None: all

    def rank_of(self, module: str) -> int:
        return next((rank for end, rank in self.rank_pattern.items() if _is_meant(end, module)), self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = next((a for end, a in self.alpha_pattern.items() if _is_meant(end, module)), self.alpha)
        return alpha / rank**0.5 if self.is_rank_stabilized else alpha / rank


def read_lora(folder: str | Path) -> LoraAdapter:
    """Read an adapter. Raises WeightsError, one line with the file and the field or tensor."""
    folder = Path(folder)
    config = parse_lora_config(read_json(folder, CONFIG_FILE), str(folder / CONFIG_FILE))
    file = SafetensorsFile(file_in(folder, WEIGHTS_FILE))
    try:
        linears = {module: _read_linear(file, config, module) for module in _modules(file, config)}
    finally:
        file.close()
    digest = hashlib.sha256()
    for module, linear in linears.items():
        digest.update(module.encode() + linear.a.tobytes() + linear.b.tobytes())
    return LoraAdapter(folder, linears, digest.hexdigest()[:16])


def parse_lora_config(fields: Mapping[str, Any], where: str) -> LoraConfig:
    """Check every field. Raises WeightsError beginning with `where`."""
    if fields.get("peft_type") != "LORA":
        raise WeightsError(f"{where}: peft_type must be 'LORA', not {_shown(fields.get('peft_type'))}")
    if fields.get("bias", "none") != "none":
        raise WeightsError(f"{where}: bias {_shown(fields['bias'])} is not supported; supported is 'none'")
    if fields.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise WeightsError(
            f"{where}: init_lora_weights {_shown(fields['init_lora_weights'])} is not supported, since it "
            "changes the base model's weights"
        )
    for name, value in fields.items():
        if value and name not in _READ | _WITHOUT_EFFECT | {"bias"}:
            raise WeightsError(f"{where}: {quoted(name)} {_shown(value)} is not supported")
    use_rslora = fields.get("use_rslora", False)
    if type(use_rslora) is not bool:
        raise WeightsError(f"{where}: use_rslora must be true or false, not {_shown(use_rslora)}")
    return LoraConfig(
        _rank(fields.get("r"), "r", where),
        _alpha(fields.get("lora_alpha"), "lora_alpha", where),
        use_rslora,
        {key: _rank(value, "rank_pattern", where) for key, value in _pattern(fields, "rank_pattern", where)},
        {
            key: _alpha(value, "alpha_pattern", where)
            for key, value in _pattern(fields, "alpha_pattern", where)
        },
        _target_modules(fields.get("target_modules"), where),
        _layers(fields.get("layers_to_transform"), where),
    )


def _shown(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else quoted(str(value))[1:-1]


def _rank(value: Any, name: str, where: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise WeightsError(f"{where}: {name} must be an integer from 1 to {MAX_RANK}, not {_shown(value)}")
    return value


def _alpha(value: Any, name: str, where: str) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise WeightsError(f"{where}: {name} must be a number, not {_shown(value)}")
    return float(value)


def _pattern(fields: Mapping[str, Any], name: str, where: str) -> list[tuple[str, Any]]:
    """Entries by the end of a module's name, or by all of it after ^."""
    entries = fields.get(name) or {}
    if not isinstance(entries, dict):
        raise WeightsError(f"{where}: {name} must be an object, not {_shown(entries)}")
    for key in entries:
        if not _PLAIN_PATTERN.fullmatch(key):
            raise WeightsError(
                f"{where}: {name} has {quoted(key)}; only names of modules are supported there"
            )
    return list(entries.items())


def _is_meant(pattern: str, module: str) -> bool:
    name = pattern.replace("\\.", ".").removesuffix("$")
    if name.startswith("^"):
        return module == name[1:]
    return f".{module}".endswith(f".{name}")


def _target_modules(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise WeightsError(f"{where}: target_modules must be names of modules, not {_shown(value)}")
    return tuple(sorted(value))


def _layers(value: Any, where: str) -> frozenset[int] | None:
    layers = [value] if type(value) is int else value or []
    if not isinstance(layers, list) or any(type(layer) is not int or layer < 0 for layer in layers):
        raise WeightsError(f"{where}: layers_to_transform must be numbers of layers, not {_shown(value)}")
    return frozenset(layers) or None


def _modules(file: SafetensorsFile, config: LoraConfig) -> list[str]:
    """The names of the linears, all of which have both matrices and are what the config says."""
    matrices: dict[str, set[str]] = {}
    for name in file.tensors:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise WeightsError(f"{file.path}: tensor {quoted(name)} is not supported: {_kind_of(name)}")
        matrices.setdefault(match["module"], set()).add(match["matrix"])
    if not matrices:
        raise WeightsError(f"{file.path}: has no tensors")
    for module, found in matrices.items():
        if len(found) < 2:
            (lacking,) = {"A", "B"} - found
            raise WeightsError(f"{file.path}: tensor {quoted(_tensor(module, lacking))} is missing")
        _check_target(file.path, config, module)
    layers = {int(number) for module in matrices for number in _LAYER.findall(module)}
    if lacking_layers := sorted((config.layers or set()) - layers):
        raise WeightsError(
            f"{file.path}: layers_to_transform has {lacking_layers[0]}, but the tensors do not"
        )
    return sorted(matrices)


def _kind_of(tensor: str) -> str:
    """Why a tensor is none of a plain adapter's."""
    if ".lora_embedding_" in tensor:
        return "adapters of embeddings are not"
    if ".lora_magnitude_vector" in tensor:
        return "DoRA is not"
    return "only lora_A.weight and lora_B.weight of linears are"


def _check_target(path: Path, config: LoraConfig, module: str) -> None:
    if config.target_modules is not None and not any(_is_meant(t, module) for t in config.target_modules):
        raise WeightsError(f"{path}: module {quoted(module)} is none of target_modules")
    if config.layers is not None and not config.layers.issuperset(map(int, _LAYER.findall(module))):
        raise WeightsError(f"{path}: module {quoted(module)} is of none of layers_to_transform")


def _tensor(module: str, matrix: str) -> str:
    return f"{_PREFIX}{module}.lora_{matrix}.weight"


def _read_linear(file: SafetensorsFile, config: LoraConfig, module: str) -> LoraLinear:
    a, b = _read(file, _tensor(module, "A")), _read(file, _tensor(module, "B"))
    rank = config.rank_of(module)
    if len(a) != rank or b.shape[1] != rank:
        raise WeightsError(
            f"{file.path}: module {quoted(module)} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
            f"which do not have the config's rank {rank}"
        )
    with np.errstate(over="ignore"):
        scaled = b * np.float32(config.scale_of(module))
    if not np.isfinite(scaled).all():
        raise WeightsError(f"{file.path}: module {quoted(module)}: lora_B times its scale is not finite")
    return LoraLinear(a, scaled)


def _read(file: SafetensorsFile, name: str) -> FloatArray:
    """A matrix in float32, in memory of its own."""
    info = file.tensors[name]
    if len(info.shape) != 2 or info.format.name not in ("F32", "F16", "BF16"):
        raise WeightsError(
            f"{file.path}: tensor {quoted(name)} is {info.format.name} {list(info.shape)}, not a matrix of "
            "F32, F16 or BF16"
        )
    try:
        check_finite(info, file.data(name))
    except WeightsError as error:
        raise WeightsError(f"{file.path}: {error}") from None
    return np.array(dequantize(file.data(name), info.format, info.shape))
