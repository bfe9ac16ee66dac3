"""Random LoRA adapters, written with the `safetensors` package as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tiny import TinyLlama, tiny_llama_tensors

RANK, ALPHA = 4, 6

Matrices = dict[str, np.ndarray]


def llama_linear_shapes(config: TinyLlama | None = None) -> dict[str, tuple[int, ...]]:
    """The weights' shapes of all linears in a tiny llama's layers, by module."""
    return {
        name.removesuffix(".weight"): weight.shape
        for name, weight in tiny_llama_tensors(config).items()
        if "_proj" in name
    }


def lora_config(modules: list[str], **changes: Any) -> dict[str, Any]:
    """What PEFT writes for adapters of these modules, with some fields changed."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        **changes,
    }


def lora_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, rank: int = RANK) -> Matrices:
    """A and B of each module, whose weight has this shape; they move its outputs by about a third."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, cols) in shapes.items():
        for name, shape in {"A": (rank, cols), "B": (rows, rank)}.items():
            values = rng.standard_normal(shape) * 0.4 / shape[1] ** 0.5
            tensors[f"base_model.model.{module}.lora_{name}.weight"] = values.astype(np.float32)
    return tensors


def write_lora(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], seed: int = 0, rank: int = RANK, **changes: Any
) -> Path:
    """A folder with an adapter of modules whose weights have these shapes."""
    return save_lora(folder, lora_config(list(shapes), r=rank, **changes), lora_tensors(shapes, seed, rank))


def save_lora(folder: Path, config: Mapping[str, Any], tensors: Matrices) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
