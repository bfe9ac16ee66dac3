"""What goes wrong with a checkpoint, said in one line."""

from __future__ import annotations


class WeightsError(ValueError):
    """A checkpoint that cannot be read: one line with the file, the field or tensor, and the byte."""


def quoted(text: str, max_length: int = 80) -> str:
    """Text from an untrusted file, on one line and cut to a readable length."""
    return repr(text if len(text) <= max_length else text[:max_length] + "…")
