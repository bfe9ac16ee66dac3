"""Bounds of numbers, so that every JSON reader agrees on which numbers are within."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

SAFE_INTEGER = 2**53 - 1  # up to here every reader takes integers exactly
NUM_DIGITS = 15  # that every reader keeps of a number

_STEP = Decimal("1e-12")  # from an exclusive bound to an inclusive one, relative where the bound is above 1


def least(minimum: float | None, exclusive: float | None) -> float | None:
    """The inclusive lower bound of numbers that satisfy both, rounded up; None where there is none.

    An exclusive bound becomes the next inside, since llguidance takes one for inclusive between neighbouring
    integers.
    """
    bounds = [] if minimum is None else [_exact(minimum)]
    if exclusive is not None:
        bounds.append(_exact(exclusive) + _step(exclusive))
    return _rounded(max([*bounds, Decimal(-SAFE_INTEGER)]), ROUND_CEILING) if bounds else None


def greatest(maximum: float | None, exclusive: float | None) -> float | None:
    """As `least`: the inclusive upper bound, rounded down."""
    bounds = [] if maximum is None else [_exact(maximum)]
    if exclusive is not None:
        bounds.append(_exact(exclusive) - _step(exclusive))
    return _rounded(min([*bounds, Decimal(SAFE_INTEGER)]), ROUND_FLOOR) if bounds else None


def is_exact(value: float) -> bool:
    """Whether every reader takes the number for the same."""
    return abs(value) <= SAFE_INTEGER and (
        isinstance(value, int) or float(f"{value:.{NUM_DIGITS}g}") == value
    )


def greatest_multiple(divisor: float) -> int:
    """Up to here every reader keeps all digits of the divisor's multiples."""
    decimals = num_decimals(divisor)
    return 10 ** max(NUM_DIGITS - decimals, 0) if decimals else SAFE_INTEGER


def num_decimals(value: float) -> int:
    """Digits after the decimal point."""
    exponent = _exact(value).normalize().as_tuple().exponent
    return max(-exponent, 0) if isinstance(exponent, int) else 0


def scaled(value: float, decimals: int) -> int:
    """The number times 10**decimals; what is left after the point is cut off."""
    return int(_exact(value) * 10**decimals)


def _exact(value: float) -> Decimal:
    return Decimal(repr(value))


def _step(bound: float) -> Decimal:
    return _STEP * max(abs(_exact(bound)), Decimal(1))


def _rounded(bound: Decimal, rounding: str) -> float:
    if bound != int(bound):
        bound = Context(NUM_DIGITS, rounding).plus(bound)
    return int(bound) if bound == int(bound) else float(bound)
