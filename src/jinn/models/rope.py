"""Rotary frequencies from a config: plain, and scaled for longer contexts (linear, llama3, YaRN)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from jinn.models.fields import ConfigError, Fields
from jinn.ops.protocol import Rope

Frequencies = npt.NDArray[np.floating[Any]]

MAX_THETA, MAX_FACTOR = 1e30, 1e6


def rope_of(fields: Fields, rotary_dim: int) -> Rope:
    """The rotation of a head's first `rotary_dim` columns. Raises ConfigError naming the field."""
    kind = fields.text("rope_type", "default")
    if kind not in SCALINGS:
        supported = ", ".join(sorted(SCALINGS))
        raise ConfigError(
            f"config field {fields.key('rope_type')} {kind!r} is not supported; supported are {supported}"
        )
    frequencies = plain_frequencies(_theta(fields), rotary_dim)
    frequencies, attention_factor = SCALINGS[kind](frequencies / _divisors(fields, rotary_dim), fields)
    return Rope(tuple(frequencies.astype(np.float32).tolist()), attention_factor)


def plain_frequencies(theta: float, rotary_dim: int) -> Frequencies:
    """theta^(-2i / rotary_dim), float32 [rotary_dim / 2]."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def num_positions(fields: Fields) -> int:
    """Positions the model is good for: YaRN adds to those of the config, which stay those of training."""
    trained = fields.integer("max_position_embeddings")
    if fields.get("rope_type") != "yarn":
        return trained
    return max(trained, int(_factor(fields) * _original_positions(fields)))


def _theta(fields: Fields) -> float:
    return _between(2, MAX_THETA, "rope_theta", fields.number("rope_theta", 10000.0), fields)


def _factor(fields: Fields) -> float:
    return _between(1, MAX_FACTOR, "factor", fields.number("factor"), fields)


def _between(low: float, high: float, name: str, value: float, fields: Fields) -> float:
    if not low <= value <= high:
        raise ConfigError(f"config field {fields.key(name)} must be from {low} to {high:g}, not {value!r}")
    return value


def _divisors(fields: Fields, rotary_dim: int) -> Frequencies:
    """What each frequency is divided by, where a GGUF file has its scaling worked out."""
    divisors = fields.get("rope_divisors")
    if divisors is None:
        return np.ones(rotary_dim // 2, np.float32)
    if len(divisors) != rotary_dim // 2:
        raise ConfigError(f"rope_freqs.weight has {len(divisors)} numbers, not {rotary_dim // 2}")
    return np.asarray(divisors, np.float32)


def _original_positions(fields: Fields) -> int:
    name = "original_max_position_embeddings"
    return fields.integer(name if fields.has(name) else "max_position_embeddings")


def _unscaled(frequencies: Frequencies, fields: Fields) -> tuple[Frequencies, float]:
    return frequencies, 1.0


def _linear(frequencies: Frequencies, fields: Fields) -> tuple[Frequencies, float]:
    return frequencies / _factor(fields), 1.0


def _llama3(frequencies: Frequencies, fields: Fields) -> tuple[Frequencies, float]:
    """Short wavelengths stay, long ones grow by `factor`, and between them both are blended."""
    factor = _factor(fields)
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise ConfigError(f"config field high_freq_factor {high} must exceed low_freq_factor {low}")
    original = fields.integer("original_max_position_embeddings")
    wavelengths = 2 * math.pi / frequencies.astype(np.float64)
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return frequencies * ((1.0 - blend) / factor + blend), 1.0


def _yarn(frequencies: Frequencies, fields: Fields) -> tuple[Frequencies, float]:
    """Pairs that turn often in the original context stay, those that turn seldom slow down (2309.00071)."""
    factor = _factor(fields)
    num_pairs = len(frequencies)
    low = max(_pair_that_turns(fields.number("beta_fast", 32.0), num_pairs, fields), 0.0)
    high = min(_pair_that_turns(fields.number("beta_slow", 1.0), num_pairs, fields), 2.0 * num_pairs - 1)
    if fields.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    width = high - low if high != low else 0.001
    slowed = np.clip((np.arange(num_pairs, dtype=np.float32) - low) / width, 0, 1)
    scaled = frequencies / factor * slowed + frequencies * (1 - slowed)
    return scaled, _yarn_attention_factor(factor, fields)


def _pair_that_turns(times: float, num_pairs: int, fields: Fields) -> float:
    """The pair, as a real number, that turns this many times in the original context."""
    turns_of_first = math.log(_original_positions(fields)) - math.log(2 * math.pi)
    return num_pairs * (turns_of_first - math.log(times)) / math.log(_theta(fields))


def _yarn_attention_factor(factor: float, fields: Fields) -> float:
    """cos and sin are multiplied by it; GGUF's own multiplier goes on top, as in llama.cpp."""
    mscale, mscale_all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
    if fields.has("attention_factor"):
        attention_factor = fields.number("attention_factor")
    elif mscale and mscale_all_dim:
        attention_factor = magnitude(factor, fields.number("mscale")) / magnitude(
            factor, fields.number("mscale_all_dim")
        )
    else:
        attention_factor = magnitude(factor, 1.0)
    return attention_factor * fields.number("attention_multiplier", 1.0)


def magnitude(factor: float, scale: float) -> float:
    """YaRN's measure of attention in a context stretched by `factor`."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


SCALINGS: dict[str, Callable[[Frequencies, Fields], tuple[Frequencies, float]]] = {
    "default": _unscaled,
    "none": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
