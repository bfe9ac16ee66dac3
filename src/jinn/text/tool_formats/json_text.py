"""JSON in calls: read with errors of one kind, and written as templates write it."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """The value. Raises ValueError where the text is no JSON, or nests too deeply."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def write_json(value: Any) -> str:
    """As templates write it."""
    return json.dumps(value, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
