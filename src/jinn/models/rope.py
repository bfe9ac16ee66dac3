"""Rotary frequencies from a config: plain, and llama3's scaling (architectures of Llama 3.1 and later)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jinn.models.fields import ConfigError, Fields
from jinn.ops.protocol import Rope


def rope_from_hf(config: Mapping[str, Any], rotary_dim: int) -> Rope:
    """From config.json, old style (`rope_theta`, `rope_scaling`) or new (`rope_parameters`)."""
    parameters = config.get("rope_parameters") or {**(config.get("rope_scaling") or {})}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"config field rope_parameters must be an object, not {parameters!r}")
    merged = {"rope_theta": config.get("rope_theta"), **parameters}
    fields = Fields(merged)
    frequencies = plain_frequencies(fields.number("rope_theta", 10000.0), rotary_dim)
    kind = fields.text("rope_type", fields.text("type", "default"))
    if kind == "default":
        return Rope(tuple(frequencies.tolist()))
    if kind == "llama3":
        return Rope(tuple((frequencies / _llama3_divisors(frequencies, fields)).astype(np.float32).tolist()))
    raise ConfigError(f"config field rope_type {kind!r} is not supported; supported are default, llama3")


def rope_from_theta(theta: float, rotary_dim: int, divisors: Sequence[float] | None = None) -> Rope:
    """From a base, each frequency divided by its divisor where there are any (GGUF's rope_freqs.weight)."""
    frequencies = plain_frequencies(theta, rotary_dim)
    if divisors is not None:
        if len(divisors) != len(frequencies):
            raise ConfigError(f"rope_freqs.weight has {len(divisors)} numbers, not {len(frequencies)}")
        frequencies = (frequencies / np.asarray(divisors, np.float32)).astype(np.float32)
    return Rope(tuple(frequencies.tolist()))


def plain_frequencies(theta: float, rotary_dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """theta^(-2i / rotary_dim), float32 [rotary_dim / 2]."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def _llama3_divisors(frequencies: np.ndarray[Any, Any], fields: Fields) -> np.ndarray[Any, Any]:
    """1 for short wavelengths, `factor` for long ones, else a blend (modeling_rope_utils)."""
    factor = fields.number("factor")
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise ConfigError(f"config field high_freq_factor {high} must exceed low_freq_factor {low}")
    original = fields.number("original_max_position_embeddings")
    wavelengths = 2 * math.pi / frequencies.astype(np.float64)
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - blend) / factor + blend))
