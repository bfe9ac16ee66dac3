"""Reading a model's config: every field checked, every error naming the field."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A config that jinn cannot run; one line that names the field."""


@dataclass(frozen=True, slots=True)
class Fields:
    """A config's fields by name. `keys` has the names under which a file keeps some of them instead.

    `tensors` are the names of the file's tensors, since some things only they tell.
    """

    values: Mapping[str, Any]
    keys: Mapping[str, str] = field(default_factory=dict)
    tensors: Container[str] = ()

    @property
    def is_gguf(self) -> bool:
        """Whether they are GGUF's metadata, which leaves out what is the same in all models of a family."""
        return bool(self.keys)

    def key(self, name: str) -> str:
        """What the file calls this field."""
        return self.keys.get(name, name)

    def get(self, name: str) -> Any:
        """The value unchecked; None where there is none."""
        return self.values.get(self.key(name))

    def has(self, name: str) -> bool:
        return self.get(name) is not None

    def is_zero(self, name: str) -> bool:
        """Whether the number is there and switches something off."""
        value = self.get(name)
        return isinstance(value, int | float) and value == 0

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"config field {self.key(name)} must be from {low} to {high}, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"config field {self.key(name)} must be a positive number, not {value!r}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"config field {self.key(name)} must be true or false, not {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._required(name, default)
        if not isinstance(value, str):
            raise ConfigError(f"config field {self.key(name)} must be a string, not {value!r}")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers from 0; empty where there is none."""
        value = self.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise ConfigError(f"config field {self.key(name)} must be a list of integers, not {value!r}")
        return tuple(value)

    def supported(self, name: str, *values: Any) -> None:
        """Raise ConfigError where the field is there with another value."""
        if self.has(name) and self.get(name) not in values:
            supported = ", ".join(map(repr, values))
            raise ConfigError(
                f"config field {self.key(name)} {self.get(name)!r} is not supported; supported is {supported}"
            )

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None and default is None:
            raise ConfigError(f"config field {self.key(name)} is missing")
        return default if value is None else value
