"""What the server needs of an engine."""

from __future__ import annotations

from typing import Protocol

from jinn.engine.client import Sink
from jinn.engine.messages import Abort, EngineStats, Ready, Score, Submit


class Engine(Protocol):
    """The engine as the server's event loop sees it. No method blocks."""

    @property
    def stats(self) -> EngineStats: ...

    @property
    def is_alive(self) -> bool: ...

    async def ready(self) -> Ready:
        """Wait until requests can be taken. Raises RuntimeError if the engine could not start."""
        ...

    async def ended(self) -> None:
        """Wait until the engine has ended."""
        ...

    async def close(self) -> None:
        """End the engine."""
        ...

    def submit(self, request: Submit | Score, sink: Sink) -> None:
        """Start a request. `sink` is called in the event loop, in order, until every choice has finished."""
        ...

    def abort(self, request: Abort) -> None:
        """Stop a request; its sink may still get what was on its way."""
        ...
