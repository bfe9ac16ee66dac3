"""uvicorn on a listening socket, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Generator
from functools import partial

import uvicorn

from jinn.server.app import App
from jinn.server.limits import MAX_HEAD_BYTES
from jinn.server.models import Models
from jinn.server.protocol import Protocol, UnreadAnswers

logger = logging.getLogger("jinn.server")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would close the socket before the requests have ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def listen(app: App, models: Models, listener: socket.socket) -> None:
    """Serve until a signal, and drain. A second signal cuts the requests that still run.

    Raises RuntimeError where the engine could not start.
    """
    server = _Server(
        uvicorn.Config(
            app,
            http=partial(Protocol, UnreadAnswers()),  # type: ignore[arg-type]  # it is only called
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ssl_certfile=models.config.tls_certificate,
            ssl_keyfile=models.config.tls_key,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
    )
    is_signalled = _handle_signals(app, models)
    serving = asyncio.create_task(server.serve([listener]))
    starting = asyncio.create_task(_start(models))
    signalled = asyncio.create_task(is_signalled.wait())
    try:
        await _until_first(signalled, serving, starting)
        await models.drain()
    finally:
        server.should_exit = True
        await serving
        for task in (starting, signalled):
            task.cancel()
        await asyncio.gather(starting, signalled, return_exceptions=True)


async def _until_first(signalled: asyncio.Task[bool], *tasks: asyncio.Task[None]) -> None:
    """Wait for the signal; raises what a task raises before."""
    pending = {signalled, *tasks}
    while not signalled.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()


async def _start(models: Models) -> None:
    await models.start()
    logger.info("ready")


def _handle_signals(app: App, models: Models) -> asyncio.Event:
    """An event that the first signal sets; a later one cuts the running requests. SIGHUP reloads the keys."""
    loop = asyncio.get_running_loop()
    is_signalled = asyncio.Event()

    def on_signal() -> None:
        if is_signalled.is_set():
            models.cut()
        is_signalled.set()

    signal.signal(signal.SIGHUP, lambda *_: loop.call_soon_threadsafe(app.state.keyring.reload))
    for number in _SIGNALS:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(on_signal))
    return is_signalled
