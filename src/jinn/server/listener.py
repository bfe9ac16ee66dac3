"""The listening socket, and uvicorn on top of it until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Generator

import uvicorn

from jinn.server.app import App
from jinn.server.limits import WRITE_SECONDS
from jinn.server.service import Service

logger = logging.getLogger("jinn.server")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bind(host: str, port: int) -> socket.socket:
    """A socket that already queues connections. Raises OSError where the address is taken or unknown."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(address[:2], family=family, backlog=1024)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Connections inherit it: the kernel drops a client that has read nothing for so long.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(WRITE_SECONDS * 1000))
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would close the socket before the requests have ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def listen(app: App, service: Service, listener: socket.socket) -> int:
    """Serve until a signal, drain, and return the exit status: 0, or 1 where the engine could not start.

    A second signal cuts the requests that still run.
    """
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
    )
    is_signalled = _handle_signals(service)
    serving = asyncio.create_task(server.serve([listener]))
    failed = asyncio.create_task(_engine_failure(service))
    signalled = asyncio.create_task(is_signalled.wait())
    await asyncio.wait((serving, failed, signalled), return_when=asyncio.FIRST_COMPLETED)
    if signalled.done():
        await service.drain()
    server.should_exit = True
    await serving
    exit_status = int(failed.done())
    for task in (failed, signalled):
        task.cancel()
    await asyncio.gather(failed, signalled, return_exceptions=True)
    return exit_status


def _handle_signals(service: Service) -> asyncio.Event:
    """An event that the first signal sets; a later one cuts the running requests."""
    loop = asyncio.get_running_loop()
    is_signalled = asyncio.Event()

    def on_signal() -> None:
        if is_signalled.is_set():
            service.cut()
        is_signalled.set()

    for number in _SIGNALS:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(on_signal))
    return is_signalled


async def _engine_failure(service: Service) -> None:
    """Returns once the engine has failed to start; never where it has started."""
    try:
        await service.start()
    except RuntimeError as error:
        logger.error("the engine could not start: %s", error)
        return
    logger.info("ready")
    await asyncio.get_running_loop().create_future()
