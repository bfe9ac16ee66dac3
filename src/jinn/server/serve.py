"""`jinn serve`: an engine process and an API in front of it, until a signal.

The engine starts first and loads while this process imports the web stack, so that is imported late.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from pathlib import Path

from jinn.engine.client import EngineClient
from jinn.engine.config import EngineConfig
from jinn.server.config import ServerConfig
from jinn.server.limits import WRITE_SECONDS
from jinn.server.logs import configure_logging

logger = logging.getLogger("jinn.server")


def serve(config: ServerConfig, engine_config: EngineConfig) -> None:
    """Serve until SIGTERM or SIGINT, and then until the running requests have ended.

    Raises OSError where the address is taken, ValueError where the model's tokenizer or template is bad, and
    EngineError where the engine cannot start.
    """
    configure_logging(config.log_level)
    asyncio.run(_serve(config, engine_config))


async def _serve(config: ServerConfig, engine_config: EngineConfig) -> None:
    listener = bind_unix(config.unix_socket) if config.unix_socket else bind(config.host, config.port)
    engine = EngineClient(engine_config)
    await engine.start()
    try:
        from jinn.frontend import load_frontend
        from jinn.server.app import App
        from jinn.server.listener import listen
        from jinn.server.service import Service

        frontend = load_frontend(engine_config.model, config.chat_template)
        service = Service(
            config,
            engine,
            frontend.tokenizer,
            frontend.encode_chat,
            file_name=Path(engine_config.model).resolve().name,
            sampling_defaults=frontend.sampling_defaults,
            pooling=frontend.pooling,
        )
        logger.info("listening on %s", _address(config, listener))
        await listen(App(service), service, listener)
    finally:
        listener.close()
        if config.unix_socket:
            Path(config.unix_socket).unlink(missing_ok=True)
        await engine.close()


def _address(config: ServerConfig, listener: socket.socket) -> str:
    if config.unix_socket:
        return f"unix:{config.unix_socket}"
    scheme = "https" if config.tls_certificate else "http"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{host}:{port}"


def bind_unix(path: str) -> socket.socket:
    """A socket in the file system that only this user may reach. Raises OSError.

    One that a server left behind is replaced; one that a server still listens on is not.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket() and not _is_listened_on(path):
            Path(path).unlink()
        mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def _is_listened_on(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        return client.connect_ex(path) == 0


def bind(host: str, port: int) -> socket.socket:
    """A socket that already queues connections. Raises OSError where the address is taken or unknown."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(address[:2], family=family, backlog=1024)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Connections inherit it: the kernel drops a client that has read nothing for so long.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(WRITE_SECONDS * 1000))
    return listener
