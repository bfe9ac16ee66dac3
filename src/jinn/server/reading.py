"""Texts that the engine only reads: for embeddings, and for what compares them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from jinn.engine.client import EngineOutput
from jinn.engine.messages import Abort, Pooling, Score, ScoreOutput
from jinn.server import errors
from jinn.server.generation import ClientGoneError, Usage
from jinn.server.interfaces import Engine

logger = logging.getLogger("jinn.server")

Vectors = npt.NDArray[np.float64]


class Reading:
    """Texts on their way through the engine. Always `close()` it."""

    def __init__(
        self,
        request_id: str,
        texts: list[tuple[int, ...]],
        pooling: Pooling,
        engine: Engine,
        adapter: str | None,
    ) -> None:
        self._request_id = request_id
        self._texts = texts
        self._pooling = pooling
        self._engine = engine
        self._adapter = adapter
        self._vectors: dict[int, tuple[float, ...]] = {}  # by text
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=sum(map(len, self._texts)))

    async def vectors(self) -> Vectors:
        """The pooled hidden states, float64 [texts, hidden_size]. Raises APIError, ClientGoneError."""
        for text, token_ids in enumerate(self._texts):
            score = Score(self._engine_id(text), token_ids, None, self._pooling, self._adapter)
            self._engine.submit(score, partial(self._receive, text))
        await self._done
        return np.array([self._vectors[text] for text in range(len(self._texts))])

    def cancel(self) -> None:
        """The client left."""
        self.fail(ClientGoneError())

    def fail(self, error: Exception) -> None:
        """End `vectors()` with this error."""
        if not self._done.done():
            self._done.set_exception(error)

    def close(self) -> None:
        """Free what is still being read."""
        self._done.cancel()
        for text in range(len(self._texts)):
            if text not in self._vectors:
                self._engine.abort(Abort(self._engine_id(text)))

    def _engine_id(self, text: int) -> str:
        return f"{self._request_id}-{text}"

    def _receive(self, text: int, output: EngineOutput) -> None:
        if self._done.done():
            return
        if isinstance(output, ScoreOutput) and output.error is None:
            self._vectors[text] = output.embedding
            if len(self._vectors) == len(self._texts):
                self._done.set_result(None)
        elif isinstance(output, ScoreOutput):
            logger.error("reading failed: %s", output.error, extra={"request_id": self._request_id})
            self.fail(errors.internal_error())
        else:
            self.fail(errors.engine_down())


def named(param: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Each text behind its path in the body."""
    return [(f"{param}[{index}]", text) for index, text in enumerate(texts)]


def normalised(vectors: Vectors, dimensions: int | None = None) -> npt.NDArray[np.float32]:
    """The first `dimensions` of each row, scaled to length 1, as float32."""
    cut = vectors[:, :dimensions]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = (cut / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return unit
