"""The models of one server: which a request means, and which are in memory.

With several, each is loaded when it is first asked for, in an engine process of its own. Where memory does
not hold them all, the one that was used least recently makes room, once nobody uses it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request

from jinn.server import errors
from jinn.server.config import ServerConfig
from jinn.server.service import RETRY_SECONDS, ModelCard, Service

logger = logging.getLogger("jinn.server")

_IDLE_CHECK_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class ServedModel:
    """A model that may be in memory; `load` starts its engine and waits until it is ready."""

    card: ModelCard
    num_bytes: int  # of weights and cache, about
    load: Callable[[], Awaitable[Service]]
    service: Service | None = None
    is_loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0  # requests
    used_at: float = 0.0  # time.monotonic()


class Models:
    """Finds, loads and unloads. The first model is the default one.

    Raises ValueError for an adapter that is called as a model, or another adapter, is.
    """

    def __init__(self, config: ServerConfig, models: Iterable[ServedModel]) -> None:
        self.config = config
        self.models = list(models)
        self.is_draining = False
        self._reserved: set[ServedModel] = set()  # that are being loaded
        self._is_room_made = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        names = {"default"}.union(*({model.card.name, *model.card.aliases} for model in self.models))
        for adapter in (adapter for model in self.models for adapter in model.card.adapters):
            if adapter in names:
                raise ValueError(f"lora has {adapter}, which is also the name of a model")
            names.add(adapter)

    @classmethod
    def of(cls, service: Service) -> Models:
        """One model, whose engine has been started."""

        async def load() -> Service:
            await service.start()
            return service

        return cls(service.config, [ServedModel(service.card, 0, load, service)])

    async def start(self) -> None:
        """Load the model, if it is the only one. Raises RuntimeError where that fails."""
        if len(self.models) == 1:
            (model,) = self.models
            async with model.is_loading:
                model.service = await model.load()
        elif self.config.idle_seconds is not None:
            self._watcher = asyncio.create_task(self._unload_idle(self.config.idle_seconds))

    def admit(self) -> None:
        """Raises APIError 503 while no request can be taken."""
        if self.is_draining:
            raise errors.unavailable("The server is shutting down.", RETRY_SECONDS)
        if len(self.models) == 1:
            service = self.models[0].service
            if service is None:
                raise errors.unavailable("The model is still loading.", RETRY_SECONDS)
            service.admit()

    def find(self, name: str) -> tuple[ServedModel, str | None]:
        """The model that a request calls so, and which adapter of it. Raises APIError 404."""
        if name == "default":
            return self.models[0], None
        for model in self.models:
            if name == model.card.name or name in model.card.aliases:
                return model, None
            if name in model.card.adapters:
                return model, name
        raise errors.model_not_found(name)

    async def acquire(self, request: Request, name: str) -> Service:
        """The model that the request names, in memory until the request has ended. Raises APIError.

        `request.state.adapter` then names the adapter of it that the request goes through, if any.
        """
        self.admit()
        model, request.state.adapter = self.find(name)
        if "release" not in request.scope["state"]:
            self._use(model, request)
        async with model.is_loading:
            if model.service is None:
                await self._load(model)
        if model.service is None:
            raise errors.unavailable("The model could not be loaded.", RETRY_SECONDS)
        return model.service

    def check_alive(self) -> None:
        """Raises APIError 503 where the only model's engine has stopped."""
        if len(self.models) == 1 and (service := self.models[0].service) and not service.engine.is_alive:
            raise errors.engine_down()

    def ignored_fields(self) -> list[str] | None:
        """Where to collect the names of unknown fields; None where they are refused."""
        return [] if self.config.tolerate_unknown_fields else None

    def exposition(self) -> bytes:
        """The text that Prometheus reads: the metrics of the models in memory, family by family."""
        registry = CollectorRegistry()
        registry.register(_Merged([m.service.metrics.registry for m in self.models if m.service]))
        return generate_latest(registry)

    async def drain(self) -> None:
        """Take no more requests, and wait until those that run have ended, or were cut at the deadline."""
        self.is_draining = True
        await asyncio.gather(*(model.service.drain() for model in self.models if model.service))

    def cut(self) -> None:
        """End every running request with an error."""
        for model in self.models:
            if model.service is not None:
                model.service.cut()

    async def close(self) -> None:
        """End every engine."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await asyncio.gather(*(model.service.close() for model in self.models if model.service))

    def _use(self, model: ServedModel, request: Request) -> None:
        model.num_users += 1

        def release() -> None:
            model.num_users -= 1
            model.used_at = time.monotonic()
            self._is_room_made.set()

        request.scope["state"]["release"] = release  # called by RequestMiddleware

    async def _load(self, model: ServedModel) -> None:
        await self._make_room(model)
        logger.info("loading model", extra={"model": model.card.name})
        started_at = time.monotonic()
        try:
            model.service = await model.load()
        except (RuntimeError, ValueError, OSError) as error:
            logger.error("the model could not be loaded: %s", error, extra={"model": model.card.name})
            raise errors.unavailable("The model could not be loaded.", RETRY_SECONDS) from None
        finally:
            self._reserved.discard(model)
            self._is_room_made.set()
        ms = round((time.monotonic() - started_at) * 1000, 1)
        logger.info("loaded model", extra={"model": model.card.name, "ms": ms})

    async def _make_room(self, model: ServedModel) -> None:
        """Unload what nobody uses until the model fits; wait while all is in use. One alone always fits."""
        budget = self.config.model_memory
        while budget is not None:
            others = [m for m in self.models if m.service or m in self._reserved]
            if not others or model.num_bytes + sum(m.num_bytes for m in others) <= budget:
                break
            idle = [m for m in others if m.service and not m.num_users]
            if idle:
                await self._unload(min(idle, key=lambda m: m.used_at))
            else:
                self._is_room_made.clear()
                await self._is_room_made.wait()
        self._reserved.add(model)

    async def _unload(self, model: ServedModel) -> None:
        service, model.service = model.service, None
        if service is not None:
            logger.info("unloading model", extra={"model": model.card.name})
            await service.close()

    async def _unload_idle(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(min(_IDLE_CHECK_SECONDS, seconds))
            for model in self.models:
                if not model.num_users and time.monotonic() - model.used_at >= seconds:
                    await self._unload(model)
                    self._is_room_made.set()


class _Merged(Collector):
    """Several registries as one, each family once."""

    def __init__(self, registries: list[CollectorRegistry]) -> None:
        self._registries = registries

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for registry in self._registries:
            for family in registry.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        return families.values()
