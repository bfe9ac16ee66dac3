"""Ends a command on SIGTERM as an exception does, so that unfinished files are deleted."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within it, SIGTERM raises SystemExit with the status that shells give."""
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
