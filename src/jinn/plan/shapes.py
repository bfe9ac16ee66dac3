"""Which model is planned: a preset, a config.json, a checkpoint or a stated assumption, at some precision.

Shapes and costs are the model files' own (jinn.models); here only bytes per weight are chosen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from jinn.models.costs import checkpoint_storage
from jinn.models.fields import ConfigError
from jinn.models.model import Model
from jinn.models.parameters import ParameterSpec
from jinn.models.presets import PRESETS, preset_config
from jinn.models.registry import model_of, model_of_config
from jinn.models.work import ModelWork, Storage, model_work
from jinn.plan.tables import ScenarioError
from jinn.weights.checkpoint import open_checkpoint

PRECISIONS = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 4.5 / 8}
"""Bytes per weight; int4 has a 16-bit scale for 32 weights, as Q4_0."""

KV_BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0625, "f32": 4.0}
"""Bytes per key or value kept; int8 has a 16-bit scale for 32."""

# Shapes that nobody published, for plans of models whose size alone is known. The planner says so.
ASSUMED: Mapping[str, Mapping[str, Any]] = {
    "MoE-1T-A32B": {
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "hidden_size": 6144,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 16384,
        "num_experts": 384,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1792,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "rope_theta": 1e7,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
    },
}
ASSUMPTION = (
    "assumed shape: models of a trillion parameters such as Qwen3-Max publish no config; this one has "
    "Qwen3-MoE's blocks and the active share of its peers (3%)"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to plan: its work at one precision, and what a token leaves in the cache."""

    name: str
    family: str
    work: ModelWork
    precision: str
    kv_dtype: str
    max_position_embeddings: int
    note: str = ""

    @property
    def kv_bytes_per_token(self) -> float:
        return sum(layer.count * self.layer_kv_bytes(layer.kv) for layer in self.work.layers)

    @property
    def state_bytes_per_sequence(self) -> float:
        """Recurrent states in float32, and tails of convolutions in bf16."""
        return sum(
            layer.count * (4 * layer.state_values + 2 * layer.conv_values) for layer in self.work.layers
        )

    def layer_kv_bytes(self, spec: Any) -> float:
        """Of one token in one layer; a value that is a part of its key (MLA's latent) is kept once."""
        return 0.0 if spec is None else kv_values(spec) * KV_BYTES[self.kv_dtype]

    @property
    def architecture(self) -> str:
        """What efficiencies are keyed by: dense, moe, mla, hybrid."""
        layers = self.work.layers
        if any(layer.state_values for layer in layers):
            return "hybrid"
        if any(layer.attention_flops != layer.expanded_flops for layer in layers):
            return "mla"
        return "moe" if any(matrix.is_expert for layer in layers for matrix in layer.matrices) else "dense"


def kv_values(spec: Any) -> int:
    """Numbers that a layer keeps of a token."""
    is_latent = spec.num_kv_heads == 1 and spec.key_dim != spec.value_dim
    return int(spec.key_dim if is_latent else spec.num_kv_heads * (spec.key_dim + spec.value_dim))


def shape_of(name: str, precision: str = "bf16", kv_dtype: str = "bf16") -> Shape:
    """A preset's, a config.json's, a folder's or a GGUF file's model. Raises ScenarioError, ConfigError."""
    if Path(name).is_file() and not name.endswith(".json"):
        return _shape_of_checkpoint(Path(name), kv_dtype)
    if precision not in PRECISIONS:
        raise ScenarioError(f"model.precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if kv_dtype not in KV_BYTES:
        raise ScenarioError(f"model.kv must be one of {', '.join(KV_BYTES)}, not {kv_dtype!r}")
    model, note = _model(name)
    work = model_work(model, uniform_storage(precision))
    short = Path(name).name if Path(name).exists() else name
    return Shape(short, model.family, work, precision, kv_dtype, model.max_position_embeddings, note)


def _shape_of_checkpoint(path: Path, kv_dtype: str) -> Shape:
    """As the file's tensors are stored; its precision is the type of most bytes."""
    with open_checkpoint(path) as checkpoint:
        model = model_of(checkpoint)
        work = model_work(model, checkpoint_storage(model, checkpoint))
        sizes: Counter[str] = Counter()
        for info in checkpoint.tensors.values():
            sizes[info.format.name] += info.nbytes
    most = sizes.most_common(1)[0][0]
    return Shape(path.name, model.family, work, most, kv_dtype, model.max_position_embeddings)


def uniform_storage(precision: str) -> Storage:
    """All matrices at one precision, but embedding, head, routers and vectors in bf16, as published files."""

    def storage(name: str, spec: ParameterSpec) -> tuple[float, str]:
        size = prod(spec.shape)
        if (
            len(spec.shape) == 1
            or name.startswith(("model.embed_tokens", "lm_head"))
            or ".gate.weight" in name
        ):
            return 2.0 * size, "bf16"
        return PRECISIONS[precision] * size, "int8" if precision == "int4" else precision

    return storage


def _model(name: str) -> tuple[Model, str]:
    assumed = {known.lower(): config for known, config in ASSUMED.items()}.get(name.lower())
    if assumed is not None:
        return _supported_model(assumed, name), ASSUMPTION
    path = Path(name)
    if path.exists():
        return _model_of_path(path), ""
    if name.lower() not in map(str.lower, PRESETS):
        known = ", ".join((*PRESETS, *ASSUMED))
        raise ScenarioError(f"model.name {name!r} is no file and no shape that jinn knows: {known}")
    return _supported_model(preset_config(name), name), ""


def _model_of_path(path: Path) -> Model:
    config = path / "config.json" if path.is_dir() else path
    if config.suffix == ".json":
        return _supported_model(_read_json(config), str(config))
    raise ScenarioError(f"model.name: {path} is neither a config.json nor a folder with one")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScenarioError(f"model.name: {path} cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise ScenarioError(f"model.name: {path} holds no JSON object")
    return config


def _supported_model(config: Mapping[str, Any], source: str) -> Model:
    """The model of a config.json. Raises ScenarioError naming the field, or the families that there are."""
    try:
        return model_of_config(config)
    except ConfigError as error:
        raise ScenarioError(f"{source}: {error}") from None
