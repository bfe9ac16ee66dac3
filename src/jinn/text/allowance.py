"""How much work a chat template may do, and what each operation costs.

A rendering gets an allowance fixed before it starts, from the size of its input. A unit is a node of the
template's syntax passed, an element touched, or eight characters read or made. What would be built, joined,
compared or printed is paid before it exists, so that no single operation outgrows what is left.
"""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sized, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.runtime import Undefined

_BASE_UNITS = 500_000  # 0.2 s at worst
_UNITS_PER_INPUT_UNIT = 4_000  # room to compare every message with every other
_MAX_UNITS = 40_000_000  # about five seconds
CHARS_PER_UNIT = 8
_HOOK_UNITS = 16  # for the check itself, which outweighs a small operation
_VALUE_UNITS = 4  # to look at one value
_MAX_INTEGER_BITS = 4096
_MAX_PRECISION = 100

_SCALARS = (int, float, range, Undefined)
_LONG_FIELD = re.compile(r"%[^%A-Za-z]*(?:\d{3}|\*)")


class AllowanceError(TemplateRuntimeError):
    """The template asked for more than its input allows."""


class Meter:
    """What is left of one rendering's allowance."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self._units = _MAX_UNITS
        self._units = min(_MAX_UNITS, _BASE_UNITS + _UNITS_PER_INPUT_UNIT * self.size(dict(variables)))

    def charge(self, units: int) -> None:
        """Raises AllowanceError once more is charged than was allowed."""
        self._units -= units + _HOOK_UNITS
        if self._units < 0:
            raise AllowanceError("it does too much work for these messages")

    def realize(self, value: Any) -> Any:
        """An iterator as a list, each item charged; any other value as it is."""
        return list(self._each(value)) if hasattr(value, "__next__") else value

    def _each(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.charge(1)
            yield item

    def size(self, value: Any) -> int:
        """Units to read all of `value`. Raises SecurityError where it holds anything but plain data."""
        if isinstance(value, str):
            return _VALUE_UNITS + len(value) // CHARS_PER_UNIT
        if value is None or isinstance(value, _SCALARS):
            return _VALUE_UNITS
        if isinstance(value, dict):
            parts: Iterable[Any] = (part for pair in value.items() for part in pair)
        elif isinstance(value, list | tuple | KeysView | ValuesView | ItemsView):
            parts = value
        else:
            raise SecurityError("it uses a function as if it were text")
        total = _VALUE_UNITS
        for part in parts:
            total += self.size(part)
            if total > self._units:
                self.charge(total)
        return total


def constant_units(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> int:
    """Work that does not grow with the value."""
    return 1


def element_units(meter: Meter, value: Any, *args: Any, **kwargs: Any) -> int:
    """Work on each element, or each character, whatever their size."""
    return 1 + (len(value) if isinstance(value, Sized) else 0)


def slice_units(meter: Meter, value: Any) -> int:
    """A copy of a part."""
    return meter.size(value) if isinstance(value, str) else element_units(meter, value)


def search_units(meter: Meter, value: Any) -> int:
    """`in`: a dict is looked up, a text or a list read through."""
    return 1 if isinstance(value, dict) else meter.size(value)


def whole_units(meter: Meter, *args: Any, **kwargs: Any) -> int:
    """Work that reads all arguments through."""
    return sum(meter.size(arg) for arg in (*args, *kwargs.values()))


def join_units(meter: Meter, items: Any, separator: Any = "", *args: Any, **kwargs: Any) -> int:
    """A text made of the items."""
    return meter.size(items) + element_units(meter, items) * meter.size(separator)


def replace_units(meter: Meter, text: Any, old: Any, new: Any, *args: Any, **kwargs: Any) -> int:
    """A copy of the text that may have grown at each `old`."""
    return meter.size(text) + str(text).count(str(old)) * meter.size(new)


def indent_units(meter: Meter, text: Any, width: Any = 4, *args: Any, **kwargs: Any) -> int:
    """A copy of the text with `width` columns, or a text, before each line."""
    columns = abs(width) if isinstance(width, int) else meter.size(width) * CHARS_PER_UNIT
    return meter.size(text) + (str(text).count("\n") + 1) * (1 + columns // CHARS_PER_UNIT)


def round_units(meter: Meter, value: Any, precision: Any = 0, *args: Any, **kwargs: Any) -> int:
    """A power of ten is made on the way."""
    if not isinstance(precision, int) or abs(precision) > _MAX_PRECISION:
        raise AllowanceError(f"it rounds to more than {_MAX_PRECISION} places")
    return 1


def format_units(meter: Meter, template: Any, *args: Any, **kwargs: Any) -> int:
    """`%` formatting: each field may print all of the values."""
    if _LONG_FIELD.search(str(template)):
        raise AllowanceError("it formats a field wider than 99 columns")
    fields = str(template).count("%")
    return meter.size(template) + fields * (100 // CHARS_PER_UNIT + whole_units(meter, *args, **kwargs))


def binop_units(meter: Meter, operator: str, left: Any, right: Any) -> int:
    """`+`, `*`, `**` and `%` on numbers, texts and lists."""
    if isinstance(left, int) and isinstance(right, int):
        return _integer_units(operator, left, right)
    if operator == "%" and isinstance(left, str):
        return format_units(meter, left, right)
    if operator == "*":
        times, items = (left, right) if isinstance(left, int) else (right, left)
        return meter.size(items) * max(1, times) if isinstance(times, int) else 1
    if operator == "+" and isinstance(left, list):
        return element_units(meter, left) + element_units(meter, right)
    return meter.size(left) + meter.size(right)


def _integer_units(operator: str, left: int, right: int) -> int:
    bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}
    if bits.get(operator, 0) > _MAX_INTEGER_BITS:
        raise AllowanceError(f"it computes an integer of more than {_MAX_INTEGER_BITS} bits")
    return 1


def method_units(meter: Meter, owner: Any, name: str, args: tuple[Any, ...]) -> int:
    """A method of a text, list, tuple or dict."""
    if isinstance(owner, dict):
        return 1
    if name == "join" and args:
        return join_units(meter, args[0], owner)
    if name == "replace" and len(args) > 1:
        return replace_units(meter, owner, args[0], args[1])
    if name in ("split", "rsplit", "splitlines"):
        return element_units(meter, owner)
    return whole_units(meter, owner, *args)
