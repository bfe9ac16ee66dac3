"""Sizes for people."""

from __future__ import annotations


def format_size(num_bytes: float) -> str:
    """Bytes for people: `103.7 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
