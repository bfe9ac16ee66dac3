"""The API process's end of the engine: starts its process, sends requests, hands each step's outputs out."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jinn.engine.config import EngineConfig
from jinn.engine.frames import FrameReader, frame
from jinn.engine.messages import (
    Abort,
    EngineStats,
    Failed,
    Loading,
    Prefilling,
    Ready,
    Score,
    ScoreOutput,
    Shutdown,
    Start,
    StepOutput,
    Submit,
    TokenOutput,
    decode,
)
from jinn.engine.spawn import ENGINE_COMMAND, SpawnedEngine, spawn

logger = logging.getLogger(__name__)

EngineOutput = TokenOutput | ScoreOutput | Prefilling | Failed
Sink = Callable[[EngineOutput], None]

_CLOSE_SECONDS = 5.0


class EngineError(RuntimeError):
    """The engine could not start."""


@dataclass(slots=True)
class _OpenRequest:
    sink: Sink
    num_choices: int  # that have not ended
    is_score: bool


class EngineClient(asyncio.Protocol):
    """An engine process, for one event loop. No method blocks.

    `on_loading` is called with each `Loading` message.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        on_loading: Callable[[Loading], None] | None = None,
    ) -> None:
        self.stats = EngineStats()  # at the end of the last step
        self._config = config
        self._command = command
        self._on_loading = on_loading
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._requests: dict[str, _OpenRequest] = {}
        self._is_settled = asyncio.Event()  # ready, or failed
        self._has_ended = asyncio.Event()
        self._ready: Ready | None = None
        self._failure: Failed | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the engine process runs and can be reached."""
        return self._transport is not None and self._failure is None

    async def start(self, spawned: SpawnedEngine | None = None) -> None:
        """Let this process load, or a new one. Raises OSError if that cannot be started."""
        engine = spawned or spawn(self._command)
        self._process = engine.process
        with suppress(ConnectionError):  # one that has ended by now is seen to end
            engine.socket.sendall(frame(Start(self._config.to_json())))
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=engine.socket)

    async def ready(self) -> Ready:
        """Wait until requests can be taken. Raises EngineError if the engine could not start or has ended."""
        await self._is_settled.wait()
        if self._ready is None or self._failure is not None:
            raise EngineError(self._failure.error if self._failure else "the engine has ended")
        return self._ready

    async def ended(self) -> None:
        """Wait until the engine has ended, by itself or by `close`."""
        await self._has_ended.wait()

    def submit(self, request: Submit | Score, sink: Sink) -> None:
        """Start a request. `sink` is called in the event loop, in order, until every choice has ended.

        If the engine has ended or ends, its last call is a `Failed`. Raises ValueError if the id is in use.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id} is already being served")
        if self._transport is None or self._failure is not None:
            sink(self._failure or Failed("the engine has not been started"))
            return
        self._transport.write(frame(request))
        self._requests[request.request_id] = _OpenRequest(
            sink, request.sampling.n if isinstance(request, Submit) else 1, isinstance(request, Score)
        )

    def abort(self, request: Abort) -> None:
        """Stop a request, or one choice of it. Its sink still gets what is on its way, then an `ABORT`."""
        if self._transport is None or self._failure is not None or request.request_id not in self._requests:
            return
        self._transport.write(frame(request))
        if self._requests[request.request_id].is_score:  # of which the engine tells nothing more
            del self._requests[request.request_id]

    async def close(self) -> None:
        """End the process; open requests get a `Failed`. Does nothing if it was not started."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(Shutdown()))
            self._transport.close()
        self._fail(Failed("the engine is shutting down"))
        process = self._process
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, _CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("the engine process does not end and is killed")
            process.kill()
            await asyncio.to_thread(process.wait)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("the engine is reached by a stream")
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for part in self._reader.feed(data):
            message = decode(part)
            if isinstance(message, StepOutput):
                self._take(message)
            elif isinstance(message, Loading):
                if self._on_loading:
                    self._on_loading(message)
            elif isinstance(message, Ready):
                self._ready = message
                self._is_settled.set()
            elif isinstance(message, Failed):
                self._end(message)
            else:
                raise ValueError(f"{type(message).__name__} is not for the engine's client")

    def connection_lost(self, error: Exception | None) -> None:
        self._end(Failed("the engine process has ended"))

    def _take(self, step: StepOutput) -> None:
        self.stats = step.stats
        for output in step.outputs:
            request = self._requests.get(output.request_id)
            if request is None:
                continue
            if output.finish_reason is not None:
                request.num_choices -= 1
                if not request.num_choices:
                    del self._requests[output.request_id]
            _call(request.sink, output)
        for score in step.scores:
            if request := self._requests.pop(score.request_id, None):
                _call(request.sink, score)
        for progress in step.prefilling:
            if request := self._requests.get(progress.request_id):
                _call(request.sink, progress)

    def _end(self, failure: Failed) -> None:
        """The engine ended by itself."""
        if self._failure is None and self._ready is not None:
            logger.error("the engine failed: %s", failure.error)
        self._fail(failure)
        if self._transport is not None:
            self._transport.close()

    def _fail(self, failure: Failed) -> None:
        """Tell all who wait; only the first failure counts."""
        self._failure = self._failure or failure
        self._is_settled.set()
        self._has_ended.set()
        requests, self._requests = self._requests, {}
        for request in requests.values():
            _call(request.sink, self._failure)


def _call(sink: Sink, output: EngineOutput) -> None:
    """One reader's error must not keep the others from their outputs."""
    try:
        sink(output)
    except Exception:
        logger.exception("a request's reader failed")
