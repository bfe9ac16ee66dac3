from __future__ import annotations

import asyncio
import inspect
import signal
from collections.abc import Iterator

import httpx
import pytest

from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models
from jinn.server.service import Service

from .fakes import ByteTokenizer, FakeEngine, encode_chat


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


@pytest.fixture
def restored_signals() -> Iterator[None]:
    """Puts back the signal handlers that serving sets."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(served_model_name="tiny/model", allowed_hosts=("test", "localhost"))


@pytest.fixture
def service(engine: FakeEngine, config: ServerConfig) -> Iterator[Service]:
    service = Service(config, engine, ByteTokenizer(), encode_chat, file_name="tiny.gguf")
    asyncio.run(service.start())
    yield service
    asyncio.run(service.close())


@pytest.fixture
def app(service: Service) -> App:
    return App(Models.of(service))


@pytest.fixture
def client(app: App) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def chat_body(**fields: object) -> dict[str, object]:
    return {"model": "default", "messages": [{"role": "user", "content": "Hello"}], **fields}
