"""Reading a model's config: every field checked, every error naming the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A config that jinn cannot run; one line that names the field."""


@dataclass(frozen=True, slots=True)
class Fields:
    """A config's fields by name. `keys` has the names under which a file keeps some of them instead."""

    values: Mapping[str, Any]
    keys: Mapping[str, str] = field(default_factory=dict)

    def key(self, name: str) -> str:
        """What the file calls this field."""
        return self.keys.get(name, name)

    def get(self, name: str) -> Any:
        """The value unchecked; None where there is none."""
        return self.values.get(self.key(name))

    def has(self, name: str) -> bool:
        return self.get(name) is not None

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

    def _required(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is None and default is None:
            raise ConfigError(f"config field {self.key(name)} is missing")
        return default if value is None else value
