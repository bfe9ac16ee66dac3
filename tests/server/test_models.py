"""Several models in one server, and an engine that ends by itself."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest

from jinn.engine.messages import Ready
from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.models import Models, ServedModel
from jinn.server.service import ModelCard, Service

from .conftest import chat_body
from .fakes import ANSWER, ByteTokenizer, FakeEngine, encode_chat
from .test_app import check_error

CHAT = "/v1/chat/completions"


class Host:
    """Models `a`, `b` and `c` of 10 bytes each, and what was done with them."""

    def __init__(self, *, load_seconds: float = 0.0, fails: bool = False, **settings: Any) -> None:
        config = ServerConfig(allowed_hosts=("test",), **settings)
        self.log: list[str] = []
        self.engines: dict[str, FakeEngine] = {}

        def served(name: str) -> ServedModel:
            card = ModelCard.create(name, f"{name}.gguf")

            async def load() -> Service:
                self.log.append(f"load {name}")
                await asyncio.sleep(load_seconds)
                if fails:
                    raise RuntimeError("no such weights")
                engine = self.engines[name] = FakeEngine(step_seconds=0.01)
                service = Service(
                    config, engine, ByteTokenizer(), encode_chat, file_name=f"{name}.gguf", card=card
                )
                await service.start()
                return service

            return ServedModel(card, 10, load)

        self.models = Models(config, [served(name) for name in "abc"])
        transport = httpx.ASGITransport(App(self.models))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    async def ask(self, model: str, **fields: Any) -> httpx.Response:
        return await self.http.post(CHAT, json=chat_body(model=model, **fields))

    @property
    def loaded(self) -> str:
        return "".join(model.card.name for model in self.models.models if model.service)


async def test_loaded_when_asked_for() -> None:
    host = Host()
    await host.models.start()
    assert (await host.http.get("/ready")).status_code == 200
    assert host.loaded == ""
    for name, expected in (("b", "b"), ("b.gguf", "b"), ("default", "a"), ("c", "c")):
        answer = (await host.ask(name)).json()
        assert answer["model"] == expected
        assert answer["choices"][0]["message"]["content"] == ANSWER
    assert host.log == ["load b", "load a", "load c"]
    listed = (await host.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["a", "b", "c"]
    check_error(await host.ask("d"), 404, "model_not_found")
    metrics = (await host.http.get("/metrics")).text
    assert metrics.count("# TYPE jinn:num_requests_running gauge") == 1
    for name in "abc":
        assert f'jinn:request_success_total{{finished_reason="stop",model_name="{name}"}}' in metrics


async def test_requests_queue_while_a_model_loads() -> None:
    host = Host(load_seconds=0.1)
    answers = await asyncio.gather(*(host.ask("a") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    assert host.log == ["load a"]


async def test_the_least_recently_used_makes_room() -> None:
    host = Host(model_memory=20)
    for name in "abac":
        await host.ask(name)
    assert host.loaded == "ac"
    assert not host.engines["b"].is_alive
    await host.ask("b")
    assert host.loaded == "bc"


async def test_a_model_in_use_is_waited_for() -> None:
    host = Host(model_memory=10)
    long = asyncio.create_task(host.ask("a", ignore_eos=True, max_tokens=60))
    while "a" not in host.loaded:
        await asyncio.sleep(0.01)
    answers = await asyncio.gather(host.ask("b"), host.ask("c"), host.ask("b"))
    assert {answer.status_code for answer in answers} == {200}
    assert (await long).json()["usage"]["completion_tokens"] == 60
    assert host.log[0] == "load a"
    assert len(host.loaded) == 1
    assert not any(model.num_users for model in host.models.models)


async def test_unloaded_when_idle() -> None:
    host = Host(idle_seconds=0.05)
    await host.models.start()
    await host.ask("a")
    await asyncio.sleep(0.3)
    assert host.loaded == ""
    assert (await host.ask("a")).status_code == 200
    await host.models.close()


async def test_a_model_that_does_not_load() -> None:
    host = Host(fails=True)
    error = check_error(await host.ask("a"), 503, "service_unavailable")
    assert "weights" not in error["message"]
    assert host.loaded == ""
    assert not any(model.num_users for model in host.models.models)


async def test_drain_waits_for_every_model() -> None:
    host = Host()
    running = [asyncio.create_task(host.ask(name)) for name in "ab"]
    while len(host.loaded) < 2 or not all(engine.running for engine in host.engines.values()):
        await asyncio.sleep(0.01)
    await host.models.drain()
    assert {task.done() and task.result().status_code for task in running} == {200}
    check_error(await host.ask("a"), 503)


def with_adapters(name: str, engine: FakeEngine, *adapters: str) -> ServedModel:
    card = ModelCard.create(name, f"{name}.gguf", adapters)

    async def load() -> Service:
        config = ServerConfig(allowed_hosts=("test",))
        service = Service(config, engine, ByteTokenizer(), encode_chat, file_name=f"{name}.gguf", card=card)
        await service.start()
        return service

    return ServedModel(card, 10, load)


class TestAdapters:
    """Model `base` with two adapters, and `other` without."""

    @pytest.fixture
    def engine(self) -> FakeEngine:
        return FakeEngine()

    @pytest.fixture
    def http(self, engine: FakeEngine) -> httpx.AsyncClient:
        served = [with_adapters("base", engine, "first", "second"), with_adapters("other", FakeEngine())]
        models = Models(ServerConfig(allowed_hosts=("test",)), served)
        return httpx.AsyncClient(transport=httpx.ASGITransport(App(models)), base_url="http://test")

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            (CHAT, {"messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/completions", {"prompt": "hi"}),
            ("/v1/completions", {"prompt": "hi", "echo": True, "logprobs": 1}),
            ("/v1/responses", {"input": "hi"}),
            ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}),
            ("/v1/embeddings", {"input": ["hi", "ho"]}),
            ("/v1/rerank", {"query": "hi", "documents": ["ho"]}),
            ("/v1/score", {"text_1": "hi", "text_2": "ho"}),
        ],
    )
    async def test_every_api_goes_through_the_adapter_it_names(
        self, http: httpx.AsyncClient, engine: FakeEngine, path: str, body: dict[str, Any]
    ) -> None:
        for name, adapter in (("second", "second"), ("base", None), ("default", None), ("base.gguf", None)):
            answer = await http.post(path, json={**body, "model": name})
            assert answer.status_code == 200
            assert answer.json()["model"] == (adapter or "base")
            asked = [*engine.submitted, *engine.scored]
            assert asked
            assert {request.adapter for request in asked} == {adapter}
            engine.submitted.clear()
            engine.scored.clear()

    async def test_they_are_listed(self, http: httpx.AsyncClient) -> None:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [(model["id"], model.get("parent")) for model in listed] == [
            ("base", None),
            ("first", "base"),
            ("second", "base"),
            ("other", None),
        ]
        assert (await http.get("/v1/models/second")).json() == listed[2]
        check_error(await http.get("/v1/models/third"), 404, "model_not_found")
        check_error(await http.post(CHAT, json=chat_body(model="third")), 404, "model_not_found")

    async def test_the_fingerprint_names_the_adapter(
        self, http: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ready = replace(await engine.ready(), adapters=(("first", "f1"), ("second", "f2")))

        async def say_ready() -> Ready:
            return ready

        monkeypatch.setattr(engine, "ready", say_ready)
        fingerprints = [
            (await http.post(CHAT, json=chat_body(model=name))).json()["system_fingerprint"]
            for name in ("base", "first", "second")
        ]
        assert fingerprints == ["fp_fake", "fp_fake-f1", "fp_fake-f2"]

    @pytest.mark.parametrize("name", ["base", "base.gguf", "default", "other", "again"])
    def test_a_name_means_one_model(self, name: str) -> None:
        served = [
            with_adapters("base", FakeEngine(), "again", name),
            with_adapters("other", FakeEngine()),
        ]
        with pytest.raises(ValueError, match=f"lora has {name}, which is also the name of a model"):
            Models(ServerConfig(), served)


class TestRestart:
    @pytest.fixture
    def engines(self) -> list[FakeEngine]:
        return [FakeEngine(step_seconds=0.01) for _ in range(3)]

    async def test_engine_that_ends_is_started_again(self, engines: list[FakeEngine]) -> None:
        started = iter(engines)

        async def start_engine() -> FakeEngine:
            return next(started)

        service = Service(
            ServerConfig(allowed_hosts=("test",)),
            await start_engine(),
            ByteTokenizer(),
            encode_chat,
            file_name="tiny.gguf",
            start_engine=start_engine,
        )
        await service.start()
        transport = httpx.ASGITransport(App(Models.of(service)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            assert (await http.post(CHAT, json=chat_body())).status_code == 200
            engines[0].is_alive = False
            check_error(await http.post(CHAT, json=chat_body()), 503, "service_unavailable")
            check_error(await http.get("/health"), 503)
            while service.engine is engines[0] or not service.engine.is_alive:
                await asyncio.sleep(0.01)
            assert (await http.post(CHAT, json=chat_body())).status_code == 200
            assert (await http.get("/health")).status_code == 200
        await service.close()
        assert not engines[1].is_alive
