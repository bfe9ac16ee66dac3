"""When two arrays count as equal. `test_compare.py` shows what this rejects."""

from __future__ import annotations

import numpy as np

TOLERANCE = 1e-5
"""What float32 accumulation in another order may cost, relative to a row's largest number."""


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Raise AssertionError unless no error of a row exceeds `tolerance` times the row's largest number."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, not {expected.shape}"
    assert np.isfinite(expected).all(), "the expected values are not finite"
    assert np.isfinite(actual).all(), f"not finite in rows {_rows(~np.isfinite(actual))}"
    error = np.abs(actual.astype(np.float64) - expected).max(axis=-1)
    size = np.abs(expected).max(axis=-1)
    is_wrong = error > tolerance * size
    with np.errstate(divide="ignore"):
        worst = (error[is_wrong] / size[is_wrong]).max(initial=0)
    assert not is_wrong.any(), f"relative error {worst:.1e} in rows {_rows(is_wrong[..., None])}"


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Raise AssertionError unless both are the same float32 numbers, to the bit."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, not {expected.shape}"
    assert actual.dtype == expected.dtype == np.float32
    differs = _bits(actual) != _bits(expected)
    assert not differs.any(), f"bits differ in rows {_rows(differs)}"


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def _rows(is_wrong: np.ndarray) -> list[int]:
    """The first few rows with anything wrong."""
    return np.flatnonzero(is_wrong.any(axis=-1))[:8].tolist()
