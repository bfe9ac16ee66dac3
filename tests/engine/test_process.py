from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_process import load_runner
from fake_runner import FakeRunner, answer, make_engine, solo

from jinn.engine.client import EngineClient, EngineError
from jinn.engine.config import EngineConfig
from jinn.engine.frames import FrameReader, frame, read_frame
from jinn.engine.messages import (
    Abort,
    Failed,
    FinishReason,
    Loading,
    Prefilling,
    Ready,
    SamplingParams,
    Shutdown,
    Start,
    Submit,
    TokenOutput,
    decode,
)
from jinn.engine.process import Connection, run, serve
from jinn.engine.spawn import spawn

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_process.py")))


def make_request(name="r", prompt=range(1, 11), **sampling):
    return Submit(name, "t", tuple(prompt), SamplingParams(**{"seed": 5, "max_tokens": 8, **sampling}))


class Inbox(list):
    """A sink that remembers."""

    def __init__(self):
        super().__init__()
        self.is_over = asyncio.Event()

    def __call__(self, output):
        self.append(output)
        if isinstance(output, Failed) or (isinstance(output, TokenOutput) and output.finish_reason):
            self.is_over.set()


@asynccontextmanager
async def engine_process(model="fake", **settings):
    client = EngineClient(EngineConfig(model, **settings), command=COMMAND)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def ask(client, request):
    inbox = Inbox()
    client.submit(request, inbox)
    await asyncio.wait_for(inbox.is_over.wait(), 20)
    return inbox


def in_time(main):
    """Runs a coroutine function as a test, for ten seconds at most."""

    def test():
        asyncio.run(asyncio.wait_for(main(), 10))

    test.__name__ = main.__name__
    return test


@in_time
async def test_round_trip():
    loading = []
    client = EngineClient(EngineConfig("fake"), command=COMMAND, on_loading=loading.append)
    assert not client.is_alive
    await client.start()
    ready = await client.ready()
    assert ready.notes == ("a note",)
    assert loading == [Loading(loaded, 1000) for loaded in range(0, 1001, 100)]
    assert client.is_alive
    requests = [make_request(f"r{i}", range(1, 10 + i), seed=i, logprobs=2) for i in range(5)]
    answers = await asyncio.gather(*(ask(client, request) for request in requests))
    assert [answer(inbox) for inbox in answers] == [solo(request) for request in requests]
    assert client.stats.num_generation_tokens == sum(len(inbox) for inbox in answers)
    await client.close()
    assert not client.is_alive
    assert client._process.returncode == 0


@in_time
async def test_a_huge_prompt_passes_while_others_are_served():
    async with engine_process("slow", max_num_batched_tokens=65536) as client:
        await client.ready()
        prompt = [1 + i % 22 for i in range(100_000)]
        neighbour = asyncio.create_task(ask(client, make_request("small", max_tokens=20)))
        inbox = await ask(client, make_request("huge", prompt, max_tokens=2))
        assert inbox[-1].finish_reason
        assert client.stats.step_seconds >= 0.01  # the slow runner's
        assert any(isinstance(output, Prefilling) for output in inbox)
        assert answer(await neighbour) == solo(make_request("small", max_tokens=20))


@in_time
async def test_abort_over_the_wire():
    async with engine_process("slow") as client:
        await client.ready()
        inbox = Inbox()
        client.submit(make_request(max_tokens=4000, ignore_eos=True), inbox)
        while not inbox:
            await asyncio.sleep(0.01)
        client.abort(Abort("r"))
        client.abort(Abort("unknown"))
        await inbox.is_over.wait()
        assert inbox[-1].finish_reason is FinishReason.ABORT
        assert client.stats.num_used_blocks == 0
        assert not client._requests
        assert (await ask(client, make_request()))[-1].finish_reason


@in_time
async def test_kill_9_fails_every_open_request():
    async with engine_process("slow") as client:
        await client.ready()
        inboxes = [Inbox() for _ in range(3)]
        for number, inbox in enumerate(inboxes):
            client.submit(make_request(f"r{number}", max_tokens=4000, ignore_eos=True), inbox)
        while not all(inboxes):
            await asyncio.sleep(0.01)
        os.kill(client._process.pid, signal.SIGKILL)
        for inbox in inboxes:
            await inbox.is_over.wait()
            assert isinstance(inbox[-1], Failed)
        assert not client.is_alive
        late = await ask(client, make_request("late"))
        assert [type(output) for output in late] == [Failed]
        client.abort(Abort("late"))
        with pytest.raises(EngineError, match="ended"):
            await client.ready()


@pytest.mark.parametrize(("model", "words"), [("fails", "no such model"), ("dies", "has ended")])
def test_a_model_that_does_not_load(model, words, capfd):
    @in_time
    async def start():
        async with engine_process(model) as client:
            with pytest.raises(EngineError, match=words):
                await client.ready()
            assert not client.is_alive

    start()


@in_time
async def test_close_fails_open_requests_and_ends_the_process():
    inbox = Inbox()
    async with engine_process("slow") as client:
        await client.ready()
        client.submit(make_request(max_tokens=4000, ignore_eos=True), inbox)
        process = client._process
    assert isinstance(inbox[-1], Failed)
    assert process.returncode == 0


def test_a_spawned_engine_that_is_not_needed_ends():
    spawned = spawn(COMMAND)
    spawned.socket.close()
    assert spawned.process.wait(20) == 0
    discarded = spawn(COMMAND)
    discarded.discard()
    assert discarded.process.returncode == -signal.SIGKILL
    assert discarded.socket.fileno() < 0


@in_time
async def test_a_spawned_engine_loads_what_it_is_told():
    spawned = spawn(COMMAND)
    client = EngineClient(EngineConfig("fake"), command=("/nonexistent",))
    await client.start(spawned)
    assert (await client.ready()).notes == ("a note",)
    await client.close()
    assert spawned.process.returncode == 0


@in_time
async def test_a_spawned_engine_that_has_died():
    spawned = spawn(COMMAND)
    spawned.process.kill()
    spawned.process.wait()
    client = EngineClient(EngineConfig("fake"))
    await client.start(spawned)
    with pytest.raises(EngineError, match="ended"):
        await client.ready()
    await client.close()


@in_time
async def test_a_client_that_was_not_started():
    client = EngineClient(EngineConfig("fake"), command=("/nonexistent",))
    inbox = Inbox()
    client.submit(make_request(), inbox)
    assert isinstance(inbox[-1], Failed)
    with pytest.raises(OSError, match="nonexistent"):
        await client.start()
    await client.close()


@in_time
async def test_an_id_in_use_is_refused():
    async with engine_process("slow") as client:
        await client.ready()
        client.submit(make_request(), Inbox())
        with pytest.raises(ValueError, match="r is already"):
            client.submit(make_request(), Inbox())


def test_what_broke_the_engine_is_told_even_to_one_who_writes(caplog):
    @in_time
    async def write():
        async with engine_process("breaks") as client:
            await client.ready()
            inboxes = {name: Inbox() for name in ("first", "second")}
            for name, inbox in inboxes.items():
                client.submit(make_request(name), inbox)
                time.sleep(0.3)  # the engine breaks, and nothing is read meanwhile
            for inbox in inboxes.values():
                await inbox.is_over.wait()
                assert "drew 0 tokens" in inbox[-1].error
            assert not client.is_alive

    write()
    assert "the engine failed: the runner drew 0 tokens" in caplog.text


@in_time
async def test_a_reader_that_raises_does_not_stop_the_others():
    def broken(output):
        raise RuntimeError("broken reader")

    async with engine_process() as client:
        await client.ready()
        client.submit(make_request("broken"), broken)
        assert answer(await ask(client, make_request())) == solo(make_request())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_left_to_the_parent(signum):
    @in_time
    async def survive():
        async with engine_process() as client:
            await client.ready()
            os.kill(client._process.pid, signum)
            assert (await ask(client, make_request()))[-1].finish_reason

    survive()


def test_the_process_ends_when_its_parent_is_gone():
    spawned = spawn(COMMAND)
    with spawned.socket as ours:
        ours.sendall(frame(Start(EngineConfig("slow").to_json())))
        ours.sendall(frame(make_request(max_tokens=4000, ignore_eos=True)))
        while not isinstance(decode(read_frame(ours)), Ready):
            pass
    assert spawned.process.wait(5) == 0


def test_the_first_message_must_be_a_start():
    spawned = spawn(COMMAND)
    with spawned.socket as ours:
        ours.sendall(frame(Shutdown()))
        assert spawned.process.wait(20) == 1


def test_a_message_that_makes_no_sense_is_dropped(caplog):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall((7).to_bytes(4, "little") + b"garbage" + frame(Ready(*[1] * 5, (), "", ())))
        ours.sendall(frame(make_request()) + frame(make_request()) + frame(Shutdown()))
        serve(Connection(theirs), make_engine(FakeRunner(8, 8)))
    assert "7 bytes" in caplog.text
    assert "Ready is not for the engine" in caplog.text
    assert "already" in caplog.text


def test_the_engine_stops_stepping_while_nobody_reads():
    """Both sides full must not deadlock, and what is unsent must not grow without end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(theirs)
        huge = Failed("x" * (1 << 20))
        for _ in range(20):
            connection.send(huge)
        assert connection.is_congested
        engine = make_engine(FakeRunner(8, 8))
        engine.submit(make_request())
        ours.setblocking(False)
        request = frame(make_request("late", [1] * 50))
        assert ours.send(request) == len(request)  # is read although nothing can be written
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            serve(connection, engine)
        assert engine.stats.num_steps == 0


def test_idle_time_checks_the_books(monkeypatch):
    monkeypatch.setattr("jinn.engine.process._IDLE_MS", 1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine = make_engine(FakeRunner(8, 8))
        ours.sendall(frame(make_request()))
        checks = []

        def check():
            checks.append(engine.stats.num_generation_tokens)
            engine._cache.check_integrity([])
            engine._cache._free.pop()  # the next check notices
            ours.sendall(frame(make_request("again")))

        engine.check_integrity = check
        monkeypatch.setattr("jinn.engine.start.Engine", lambda *_: engine)
        assert run(theirs, EngineConfig("fake"), load_runner) == 1
        assert len(checks) == 2
        reader = FrameReader()
        received = list(map(decode, reader.feed(ours.recv(1 << 20))))
        assert isinstance(received[-1], Failed)
        assert "lost" in received[-1].error


def test_config_survives_json_and_names_what_is_wrong():
    config = EngineConfig("m", num_threads=3, kv_cache_dtype="int8", tenant_cache_memory=0)
    assert EngineConfig.from_json(config.to_json()) == config
    for text, words in [
        ('{"model": "m", "modle": 1}', "unknown setting modle"),
        ("[]", "object"),
        ('{"model": ""}', "model"),
        ('{"model": "m", "num_threads": 0}', "num_threads"),
        ('{"model": "m", "num_threads": 1.0}', "num_threads"),
        ('{"model": "m", "max_model_len": 1}', "max_model_len"),
        ('{"model": "m", "max_num_seqs": 0}', "max_num_seqs"),
        ('{"model": "m", "max_num_batched_tokens": true}', "max_num_batched_tokens"),
        ('{"model": "m", "max_step_ms": NaN}', "max_step_ms"),
        ('{"model": "m", "cache_memory": 0}', "cache_memory"),
        ('{"model": "m", "kv_cache_dtype": "f16"}', "kv_cache_dtype must be one of bf16, int8, f32"),
        ('{"model": "m", "activations": "f16"}', "activations"),
        ('{"model": "m", "block_size": 0}', "block_size"),
    ]:
        with pytest.raises(ValueError, match=words):
            EngineConfig.from_json(text)


def test_the_engine_process_imports_only_what_it_needs():
    code = "import sys, jinn.engine.process, jinn.engine.loading, jinn.engine.client; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()  # noqa: S603
    heavy = {"torch", "transformers", "gguf", "starlette", "pydantic", "tokenizers", "jinja2", "llguidance"}
    for_some = {
        "importlib.metadata",
        "shutil",
        "jinn.engine.drafting",
        "jinn.models.deepseek_v3",
        "jinn.server",
    }
    assert (heavy | for_some) & set(names) == set()
