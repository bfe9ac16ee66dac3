"""`jinn serve`: an engine process and an API in front of it, until a signal.

The engine starts first and loads while this process imports the web stack, so that is imported late.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jinn.engine.client import EngineClient
from jinn.engine.config import EngineConfig
from jinn.engine.spawn import SpawnedEngine
from jinn.logs import configure_logging
from jinn.server.config import ServerConfig
from jinn.server.limits import WRITE_SECONDS

if TYPE_CHECKING:
    from jinn.server.models import ServedModel
    from jinn.server.service import ModelCard, Service
    from jinn.server.tracing import Tracer

logger = logging.getLogger("jinn.server")


def serve(
    config: ServerConfig,
    engine_config: EngineConfig,
    more_models: Mapping[str, str] | None = None,
    spawned: SpawnedEngine | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, and then until the running requests have ended.

    With `more_models`, paths by name, each of them and the model of `engine_config` is loaded when it is
    asked for; without, `spawned` loads the model at once, if it is given. Raises OSError where the address
    is taken, ValueError where the only model's tokenizer or template is bad or OpenTelemetry is missing, and
    EngineError where its engine cannot start.
    """
    configure_logging(config.log_level)
    if more_models and spawned is not None:
        spawned.discard()
    asyncio.run(_serve(config, engine_config, more_models or {}, spawned))


async def _serve(
    config: ServerConfig,
    engine_config: EngineConfig,
    more_models: Mapping[str, str],
    spawned: SpawnedEngine | None,
) -> None:
    listener = bind_unix(config.unix_socket) if config.unix_socket else bind(config.host, config.port)
    engine = None if more_models else await start_engine(engine_config, spawned)
    models = None
    try:
        from jinn.server.app import App
        from jinn.server.listener import listen
        from jinn.server.models import Models

        if engine is not None:
            models = Models.of(make_service(config, engine_config, engine))
        else:
            models = Models(config, served_models(config, engine_config, more_models))
        logger.info("listening on %s", _address(config, listener))
        async with tracing(config.otlp_traces_endpoint) as tracer:
            await listen(App(models, tracer), models, listener)
    finally:
        listener.close()
        if config.unix_socket:
            Path(config.unix_socket).unlink(missing_ok=True)
        if models is not None:
            await models.close()
        elif engine is not None:
            await engine.close()


@contextlib.asynccontextmanager
async def tracing(endpoint: str | None) -> AsyncIterator[Tracer | None]:
    """What sends traces to a URL, if to any, and in the end what is left of them.

    Raises ValueError where OpenTelemetry is not installed.
    """
    if endpoint is None:
        yield None
        return
    try:
        from jinn.server.tracing import Tracer
    except ImportError:
        raise ValueError("otlp_traces_endpoint needs OpenTelemetry: pip install 'jinn[otel]'") from None
    tracer = Tracer.to(endpoint)
    try:
        yield tracer
    finally:
        await asyncio.to_thread(tracer.close)


async def start_engine(engine_config: EngineConfig, spawned: SpawnedEngine | None = None) -> EngineClient:
    """An engine process that loads, `spawned` or a new one. Raises OSError."""
    engine = EngineClient(engine_config)
    await engine.start(spawned)
    return engine


def make_service(
    config: ServerConfig, engine_config: EngineConfig, engine: EngineClient, card: ModelCard | None = None
) -> Service:
    """A model behind HTTP, with its text side read. Raises ValueError where that is bad."""
    from jinn.frontend import load_frontend
    from jinn.server.service import ModelCard, Service
    from jinn.text.chat_format import ChatFormat

    frontend = load_frontend(engine_config.model, config.chat_template)
    file_name = Path(engine_config.model).resolve().name
    if card is None:
        name = config.served_model_name or file_name
        card = ModelCard.create(name, file_name, engine_config.lora_adapters)
    return Service(
        config,
        engine,
        frontend.tokenizer,
        frontend.encode_chat,
        file_name=file_name,
        sampling_defaults=frontend.sampling_defaults,
        pooling=frontend.pooling,
        chat_format=ChatFormat.of(frontend.template, config.tool_format),
        card=card,
        start_engine=partial(start_engine, engine_config),
    )


def served_models(
    config: ServerConfig, engine_config: EngineConfig, more_models: Mapping[str, str]
) -> list[ServedModel]:
    """The model of `engine_config` with its adapters, then the others without, none of them loaded."""
    from jinn.server.models import ServedModel
    from jinn.server.service import ModelCard

    def served(name: str | None, path: str, adapters: Mapping[str, str]) -> ServedModel:
        file_name = Path(path).resolve().name
        card = ModelCard.create(name or file_name, file_name, adapters)
        own_config = replace(engine_config, model=path, lora_adapters=adapters)
        num_weight_bytes = sum(weight_bytes(Path(part)) for part in (path, *adapters.values()))

        async def load() -> Service:
            engine = await start_engine(own_config)
            try:
                service = await asyncio.to_thread(make_service, config, own_config, engine, card)
                await service.start()
            except BaseException:
                await engine.close()
                raise
            return service

        return ServedModel(card, num_weight_bytes + engine_config.cache_memory, load)

    first = served(config.served_model_name, engine_config.model, engine_config.lora_adapters)
    return [first, *(served(name, path, {}) for name, path in more_models.items())]


def weight_bytes(path: Path) -> int:
    """The size of a model's file, or of all in its folder. Raises OSError."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


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
