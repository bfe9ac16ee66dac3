"""Which parameters an adapter's linears belong to, and what it is checked against: the model's own shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jinn.models.model import Model
from jinn.models.parameters import NewFile, Origin, ParameterSpec
from jinn.ops.protocol import FloatArray, LowRank
from jinn.weights.errors import WeightsError, quoted
from jinn.weights.lora import LoraAdapter, LoraLinear, read_lora

Make = Callable[[FloatArray], Any]
"""Turns a matrix into what the ops read."""

_TEXT_PREFIX = "model.language_model."  # of language models within others


def read_adapters(model: Model, paths: Mapping[str, str]) -> dict[str, LoraAdapter]:
    """Adapters by name. Raises WeightsError for one that is broken or does not fit the model."""
    adapters = {name: read_lora(path) for name, path in paths.items()}
    for adapter in adapters.values():
        for _ in _changes(model, adapter):
            pass
    return adapters


def adapter_parameters(
    model: Model, adapters: Sequence[LoraAdapter], make: Make
) -> dict[str, list[LowRank | None]]:
    """Of each linear that an adapter changes, by the key of its node's `adapters`."""
    parameters: dict[str, list[LowRank | None]] = {}
    for index, adapter in enumerate(adapters):
        for name, change in _changes(model, adapter):
            key = f"{name.removesuffix('.weight')}.adapters"
            changes = parameters.setdefault(key, [None] * len(adapters))
            changes[index] = LowRank(make(change.a), make(change.b))
    return parameters


def digests(adapters: Mapping[str, LoraAdapter]) -> tuple[tuple[str, str], ...]:
    """Names, in the order of their numbers, with what names their weights."""
    return tuple((name, adapter.digest) for name, adapter in adapters.items())


def _changes(model: Model, adapter: LoraAdapter) -> Iterator[tuple[str, LoraLinear]]:
    """The parameters that the adapter changes, with rows and columns in their order. Raises WeightsError."""
    origins, specs = model.origins(NewFile("hf")), model.parameters()
    parameters_of: dict[str, list[str]] = {}
    for name, origin in origins.items():
        for tensor in origin.names:
            parameters_of.setdefault(tensor, []).append(name)
    for module, linear in adapter.linears.items():
        name = f"{module.replace(_TEXT_PREFIX, 'model.', 1)}.weight"
        for parameter in parameters_of.get(name, ()):
            spec, origin = specs[parameter], origins[parameter]
            if _is_adaptable(parameter, spec, origin):
                _check_shape(adapter, module, origin.shape_of(spec), linear)
                yield parameter, _in_order(origin, linear)
            else:
                raise WeightsError(
                    f"{adapter.path}: module {quoted(module)} is not supported: adapters change linears of "
                    "attention, of MLPs and of shared experts"
                )
        if name not in parameters_of:
            raise WeightsError(f"{adapter.path}: module {quoted(module)} is none of the model's")


def _is_adaptable(name: str, spec: ParameterSpec, origin: Origin) -> bool:
    """Whether it is a linear of a layer, whose rows are rows of the checkpoint's. A router is none."""
    is_linear = len(spec.shape) == 2 and spec.is_packed and not name.endswith(".mlp.gate.weight")
    return is_linear and name.startswith("model.layers.") and not origin.is_transposed


def _check_shape(adapter: LoraAdapter, module: str, shape: tuple[int, ...], linear: LoraLinear) -> None:
    found = (linear.b.shape[0], linear.a.shape[1])
    if found != shape:
        raise WeightsError(
            f"{adapter.path}: module {quoted(module)} is for a weight {list(found)}, but the model's is "
            f"{list(shape)}"
        )


def _in_order(origin: Origin, linear: LoraLinear) -> LoraLinear:
    """With the rows and columns that the parameter has of the checkpoint's weight."""
    a = linear.a if origin.columns is None else linear.a[:, origin.columns]
    b = linear.b if origin.rows is None else linear.b[origin.rows]
    return LoraLinear(np.ascontiguousarray(a), np.ascontiguousarray(b))
