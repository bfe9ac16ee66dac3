"""`jinn inspect`: what a model's file holds, and what serving it takes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jinn.cli.options import DEFAULTS
from jinn.sizes import format_size

if TYPE_CHECKING:
    from jinn.models.model import Model
    from jinn.weights.checkpoint import Checkpoint

KV_CACHE_DTYPES = ("bf16", "int8", "f32")


def inspect(
    model: Annotated[str, typer.Argument(help="A .gguf file, a Hugging Face folder or a pulled name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe a model without loading it."""
    from jinn.weights.hub import resolve_model

    description = describe(resolve_model(model))
    print(json.dumps(description) if as_json else format_description(description))


def describe(path: Path) -> dict[str, Any]:
    """Family, shapes, parameters, tensors and memory. Raises WeightsError, ConfigError."""
    from jinn.engine.memory import OVERHEAD_BYTES, available_memory, disk_speed, footprint
    from jinn.models.costs import costs
    from jinn.models.registry import model_of
    from jinn.models.sources import parameter_sources
    from jinn.weights.checkpoint import open_checkpoint

    with open_checkpoint(path) as checkpoint:
        model = model_of(checkpoint)
        sources = parameter_sources(model, checkpoint)
        weights = sum(info.nbytes for info in checkpoint.tensors.values())
        cache, available = DEFAULTS["cache_memory"], available_memory()
        needed = footprint(sources.values())
        return {
            "model": str(path),
            "family": model.family,
            "architecture": checkpoint.architecture,
            "shapes": _shapes(model),
            "parameters": {
                "total": sum(prod(spec.shape) for spec in model.parameters().values()),
                "active": model.active_parameters(),
            },
            "tensors": _tensors_by_type(checkpoint),
            "bytes": weights,
            "kv_bytes_per_token": {dtype: kv_bytes_per_token(model, dtype) for dtype in KV_CACHE_DTYPES},
            "memory_to_serve": {
                "weights": weights,
                "cache": cache,
                "overhead": OVERHEAD_BYTES,
                "total": weights + cache + OVERHEAD_BYTES,
            },
            "memory_available": available,
            "fits": needed.fits(cache, available),
            "read_bytes_per_token": costs(model, checkpoint).weight_bytes,
            "disk_bytes_per_token": (read := needed.uncached_per_token(cache, available)),
            "disk_seconds_per_token": read / disk_speed(checkpoint.largest_file) if read else 0.0,
        }


def _shapes(model: Model) -> dict[str, int | float | bool]:
    config: Any = model
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _tensors_by_type(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        counts[info.format.name] += 1
        sizes[info.format.name] += info.nbytes
    return {name: {"count": counts[name], "bytes": sizes[name]} for name in sorted(counts)}


def kv_bytes_per_token(model: Model, dtype: str) -> int:
    """What the cache keeps of one token over all layers; of a whole block, divided among its tokens."""
    return kv_block_bytes(model, dtype) // int(DEFAULTS["block_size"])


def kv_block_bytes(model: Model, dtype: str) -> int:
    """Bytes of a cache block of the default size."""
    from jinn import _native

    layers = [(spec.num_kv_heads, spec.key_dim, spec.value_dim) for spec in model.kv_specs()]
    block_bytes: int = _native.KVCache(layers, dtype, 1, DEFAULTS["block_size"]).block_bytes
    return block_bytes


def format_description(description: dict[str, Any]) -> str:
    """The description for people."""
    parameters, memory = description["parameters"], description["memory_to_serve"]
    rows = [
        ("model", description["model"]),
        ("family", f"{description['family']} ({description['architecture']})"),
        *((name, str(value)) for name, value in description["shapes"].items()),
        ("parameters", f"{parameters['total']:,}, of which {parameters['active']:,} are active"),
        *(
            (f"{name} tensors", f"{tensors['count']}, {format_size(tensors['bytes'])}")
            for name, tensors in description["tensors"].items()
        ),
        ("bytes", format_size(description["bytes"])),
        *(
            (f"{dtype} cache", f"{num_bytes:,} bytes per token")
            for dtype, num_bytes in description["kv_bytes_per_token"].items()
        ),
        ("reads", f"{format_size(description['read_bytes_per_token'])} of weights per token"),
        (
            "memory to serve",
            f"{format_size(memory['total'])}: weights {format_size(memory['weights'])}, cache up to "
            f"{format_size(memory['cache'])}, the rest {format_size(memory['overhead'])}",
        ),
        ("memory there is", f"{format_size(description['memory_available'])}{_verdict(description)}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _verdict(description: dict[str, Any]) -> str:
    """What follows from the memory there is."""
    if description["fits"]:
        return ", enough"
    per_token = description["disk_bytes_per_token"]
    if not per_token:
        return ", too little"
    return (
        f": experts will be read from disk, about {format_size(per_token)} for a token, "
        f"which takes this one {description['disk_seconds_per_token']:.2g} s"
    )
