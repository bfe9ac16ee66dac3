"""The comparison that all kernel tests rest on must reject what is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from .compare import assert_close, assert_same_bits

EXPECTED = np.random.default_rng(0).standard_normal((65, 48)).astype(np.float32)


def zeros(x):
    x[:] = 0


def wrong_scale(x):
    x *= np.float32(1 + 3e-5)


def wrong_scale_of_one_group(x):
    x[:, :32] *= np.float32(1 + 3e-5)


def one_wrong_row(x):
    x[40] = x[41]


def one_wrong_number(x):
    x[64, 47] += 1e-3


def nan(x):
    x[3, 3] = np.nan


def swapped_columns(x):
    x[:, [0, 1]] = x[:, [1, 0]]


@pytest.mark.parametrize(
    "fault",
    [zeros, wrong_scale, wrong_scale_of_one_group, one_wrong_row, one_wrong_number, nan, swapped_columns],
)
def test_a_fault_is_rejected(fault):
    actual = EXPECTED.copy()
    fault(actual)
    with pytest.raises(AssertionError):
        assert_close(actual, EXPECTED)
    with pytest.raises(AssertionError, match="bits differ"):
        assert_same_bits(actual, EXPECTED)


def test_a_row_of_zeros_must_be_zero():
    expected = EXPECTED.copy()
    expected[5] = 0
    assert_close(expected, expected)
    with pytest.raises(AssertionError, match=r"rows \[5\]"):
        assert_close(expected + np.float32(1e-12), expected)


def test_shapes_must_be_equal():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(EXPECTED[:1], EXPECTED)


def test_rounding_passes():
    assert_close(EXPECTED * np.float32(1 + 1e-6), EXPECTED)


def test_one_ulp_is_another_bit():
    actual = EXPECTED.copy()
    actual[7, 7] = np.nextafter(actual[7, 7], np.float32(9))
    with pytest.raises(AssertionError, match=r"rows \[7\]"):
        assert_same_bits(actual, EXPECTED)
