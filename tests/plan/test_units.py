from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jinn.plan.units import UnitError, convert, duration, money, parse, short


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("608e9 tokens/day", "tokens/s", 608e9 / 86400),
        ("73.7k tokens/s", "tokens/s", 73700),
        ("73.7 ktokens/s", "tokens/s", 73700),
        ("2 $/h", "$/s", 2 / 3600),
        ("2 USD/h", "$/s", 2 / 3600),
        ("0.14 USD/Mtokens", "$/Mtokens", 0.14),
        ("0.14 USD/M tokens", "$/Mtokens", 0.14),
        ("40 ms", "s", 0.04),
        ("80 GB", "B", 80e9),
        ("80 GiB", "B", 80 * 2**30),
        ("400 Gb/s", "GB/s", 50),
        ("0.08 USD/kWh", "$/kWh", 0.08),
        ("1 kWh", "Wh", 1000),
        ("55%", "1", 0.55),
        ("1,000", "tokens", 1000),
        (5, "s", 5),
    ],
)
def test_parse(text, unit, expected):
    assert parse(text, unit) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "unit", "error"),
    [
        ("3 parsecs", "s", "unit 'parsecs' is not known"),
        ("3 GB", "s", "is not in units of s"),
        ("3 tokens", "tokens/s", "is not in units of tokens/s"),
        ("much", "s", "does not begin with a number"),
        ("", "s", "does not begin with a number"),
        (True, "s", "must be a number"),
        (None, "s", "must be a number"),
        (math.nan, "s", "finite"),
        (math.inf, "s", "finite"),
        ("1e999 s", "s", "finite"),
        ("5 CNY", "$", "does not say what that is worth"),
    ],
)
def test_refused(value, unit, error):
    with pytest.raises(UnitError, match=error.replace("[", r"\[")):
        parse(value, unit)


def test_other_currencies_by_their_worth():
    assert parse("7.17 CNY", "$", {"USD": 1.0, "CNY": 1 / 7.17}) == pytest.approx(1.0)


@given(
    st.floats(1e-9, 1e12),
    st.sampled_from([("tokens/s", "Mtokens/day"), ("GB/s", "Gb/s"), ("$/h", "$/year"), ("ms", "h")]),
)
def test_conversions_go_back(number, units):
    assert convert(convert(number, *units), *reversed(units)) == pytest.approx(number, rel=1e-12)


def test_for_people():
    assert [short(x) for x in (0, 0.0123, 1240, 5.62e5, 3e9)] == ["0", "0.0123", "1.24k", "562k", "3G"]
    assert money(87114.2, "USD") == "87,114 USD"
    assert money(1.3699, "USD") == "1.37 USD"
    assert [duration(x) for x in (2e-6, 0.0245, 1.6, 86400 * 78)] == ["2 us", "24.5 ms", "1.6 s", "78 days"]
