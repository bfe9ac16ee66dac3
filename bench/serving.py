"""Serves one file with jinn and each peer in turn, and measures what clients see over HTTP.

    make bench-serving LLAMA_CPP=DIR          # the folder with llama-server
    python bench/serving.py model.gguf --llama-cpp DIR --peer-file best.gguf --vllm PYTHON --hf FOLDER

Every server is asked by the same lean client: streaming chat completions over plain sockets, prompts of some
110 tokens that share nothing, 128 tokens out each, whatever the model would rather end with. Besides the
throughput by number of clients: the time from the program's start to its first 200 of /ready or /health, the
time to first token when a system prompt of some 1,500 tokens is new and when it was just read, and the
longest gap in a neighbour's stream while a prompt of some 2,000 tokens is read. Servers take turns; the
figures are medians over the rounds, the ratios those of a round's two figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

MAX_TOKENS = 128
NEIGHBOUR_TOKENS = 512  # more than come while a long prompt is read
PROMPT_TOKENS = 85  # some 110 with the template
SYSTEM_TOKENS = 1_450
LONG_TOKENS = 1_950
START_SECONDS = 300.0
_COMMON_HEAD = "Host: 127.0.0.1\r\nConnection: close\r\n"
NOUNS = ("river", "stone", "window", "garden", "music", "winter", "paper", "bridge", "silver", "market")


@dataclass(frozen=True, slots=True)
class Server:
    """A program that serves OpenAI's chat completions on `{port}`."""

    name: str
    command: tuple[str, ...]
    ready_path: str
    env: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def run(self) -> Iterator[Running]:
        """Start it, wait until it is ready, and stop it at the end. Raises TimeoutError or OSError."""
        port = _free_port()
        command = [part.replace("{port}", str(port)) for part in self.command]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=os.environ | self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            asyncio.run(_until_ready(port, self.ready_path, process))
            yield Running(port, time.perf_counter() - started)
        finally:
            process.terminate()
            process.wait()


@dataclass(frozen=True, slots=True)
class Running:
    port: int
    seconds_to_ready: float


@dataclass(slots=True)
class Answer:
    """When a request was sent, and when each chunk with text came (seconds); the tokens that usage counts."""

    sent: float
    chunks: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0

    @property
    def first(self) -> float:
        return self.chunks[0] - self.sent

    @property
    def longest_gap(self) -> float:
        return max((b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)), default=0.0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


async def _until_ready(port: int, path: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise OSError(f"the server ended with status {process.returncode}")
        with suppress(OSError):
            async with _connection(port) as (reader, writer):
                writer.write(f"GET {path} HTTP/1.1\r\n{_COMMON_HEAD}\r\n".encode())
                if b" 200 " in await reader.readline():
                    return
        await asyncio.sleep(0.01)
    raise TimeoutError(f"not ready within {START_SECONDS:.0f} s")


async def ask(
    port: int, messages: list[dict[str, str]], max_tokens: int = MAX_TOKENS, key: str = "", **more: Any
) -> Answer:
    """One streaming request, with `more` fields. Raises RuntimeError where the server refuses it."""
    body = {
        "model": "default",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\n{_COMMON_HEAD}Authorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    async with _connection(port) as (reader, writer):
        answer = Answer(time.perf_counter())
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()}")
        async for line in reader:
            if line.startswith(b"data: {"):
                _note(json.loads(line[6:]), answer)
    return answer


@asynccontextmanager
async def _connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _note(chunk: dict[str, Any], answer: Answer) -> None:
    if any(choice["delta"].get("content") or choice.get("logprobs") for choice in chunk["choices"]):
        answer.chunks.append(time.perf_counter())
    if usage := chunk.get("usage"):
        answer.num_tokens = usage["completion_tokens"]
        answer.num_prompt_tokens = usage["prompt_tokens"]


class Texts:
    """Prompts that share nothing with one another."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)  # noqa: S311  (no secret)
        self._tokens_per_word = 1.0

    def user(self, num_tokens: int) -> dict[str, str]:
        words = self._rng.choices(NOUNS, k=round(num_tokens / self._tokens_per_word))
        return {"role": "user", "content": " ".join(words)}

    def system(self, num_tokens: int) -> dict[str, str]:
        return {**self.user(num_tokens), "role": "system"}

    async def count(self, port: int) -> None:
        """Ask the server how many of its tokens a word has."""
        few, many = [(await ask(port, [self.user(n)], max_tokens=2)).num_prompt_tokens for n in (10, 110)]
        self._tokens_per_word = (many - few) / 100


async def throughput(port: int, texts: Texts, num_clients: int, **options: Any) -> float:
    """Output tokens per second of so many clients together, who ask twice each; with options of `ask`."""

    async def client() -> int:
        return sum([(await ask(port, [texts.user(PROMPT_TOKENS)], **options)).num_tokens for _ in range(2)])

    started = time.perf_counter()
    num_tokens = await asyncio.gather(*(client() for _ in range(num_clients)))
    return sum(num_tokens) / (time.perf_counter() - started)


async def first_token(port: int, texts: Texts) -> dict[str, float]:
    """Milliseconds to the first token: after a new system prompt, and after one just read."""
    system = texts.system(SYSTEM_TOKENS)
    cold, warm = [await ask(port, [system, texts.user(20)], max_tokens=4) for _ in range(2)]
    return {
        "first token, new system prompt, ms": 1e3 * cold.first,
        "first token, the same system prompt again, ms": 1e3 * warm.first,
    }


async def neighbours_gap(port: int, texts: Texts) -> float:
    """Milliseconds of the longest gap in a stream while another's long prompt is read.

    With log-probabilities each token comes at once, even one that has no text of its own.
    """
    stream = asyncio.create_task(ask(port, [texts.user(20)], max_tokens=NEIGHBOUR_TOKENS, logprobs=True))
    await asyncio.sleep(0.3)
    long = await ask(port, [texts.user(LONG_TOKENS)], max_tokens=1)
    answer = await stream
    if answer.chunks[-1] < long.chunks[-1]:
        raise RuntimeError("the neighbour's stream ended before the long prompt was read")
    return 1e3 * answer.longest_gap


async def measure(running: Running, texts: Texts, clients: list[int]) -> dict[str, float]:
    """By case, one figure."""
    await texts.count(running.port)  # which makes whatever is made when it is first used
    figures = {"start to ready, s": running.seconds_to_ready}
    for num_clients in clients:
        name = f"tokens/s, {num_clients} client{'s' * (num_clients > 1)}"
        figures[name] = await throughput(running.port, texts, num_clients)
    figures |= await first_token(running.port, texts)
    figures["neighbour's longest gap, ms"] = await neighbours_gap(running.port, texts)
    return figures


def alternate(servers: list[Server], rounds: int, clients: list[int]) -> dict[str, list[dict[str, float]]]:
    """By server, the figures of each round."""
    found: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
    for number in range(rounds):
        for server in servers:
            with server.run() as running:
                figures = asyncio.run(measure(running, Texts(number), clients))
            found[server.name].append(figures)
            shown = ", ".join(f"{case} {figure:.2f}" for case, figure in figures.items())
            print(f"round {number + 1}: {server.name}: {shown}", file=sys.stderr)
    return found


def markdown(model: str, threads: int, found: dict[str, list[dict[str, float]]], not_run: list[str]) -> str:
    """Medians by case and server, and jinn's ratio to each."""
    ours = found["jinn"]
    lines = [
        f"`{model}`, {threads} threads, {len(ours)} rounds.",
        "",
        "| case | server | median | range | jinn's over it |",
        "|---|---|---|---|---|",
    ]
    for case in ours[0]:
        for name, rounds in found.items():
            values = [figures[case] for figures in rounds]
            ratio = median(a[case] / b[case] for a, b in zip(ours, rounds, strict=True))
            lines.append(
                f"| {case} | {name} | {median(values):.2f} | {min(values):.2f}–{max(values):.2f} "
                f"| {'' if name == 'jinn' else f'{ratio:.2f}'} |"
            )
    lines += [f"| all | {name} | not run | | |" for name in not_run]
    return "\n".join(lines) + "\n"


def servers_of(options: argparse.Namespace, model: Path) -> tuple[list[Server], list[str]]:
    """jinn and the peers that are there, and the names of the others."""
    threads, most = str(options.threads), max(16, *options.clients)
    jinn = str(Path(sys.executable).with_name("jinn"))
    command = (jinn, "serve", str(model), "--threads", threads, "--port", "{port}", *options.jinn.split())
    servers, not_run = [Server("jinn", command, "/ready")], []
    folder = options.llama_cpp
    if folder and (folder / "llama-server").exists():
        files = dict.fromkeys([model, *([options.peer_file] if options.peer_file else [])])
        env = {"LD_LIBRARY_PATH": f"{folder}{os.pathsep}{os.environ.get('LD_LIBRARY_PATH', '')}"}
        for file in files:
            command = (str(folder / "llama-server"), "-m", str(file), "-t", threads, "--port", "{port}")
            command += ("-np", str(most), "-c", str(most * 4096), "--no-webui", *options.llama_server.split())
            servers.append(Server(f"llama-server, {file.name}", command, "/health", env))
    else:
        not_run.append("llama-server")
    if options.vllm and options.hf:
        command = (str(options.vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.hf))
        command += ("--served-model-name", "default", "--port", "{port}", "--max-model-len", "4096")
        env = {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": threads}
        servers.append(Server("vLLM", command, "/health", env))
    else:
        not_run.append("vLLM")
    return servers, not_run


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf file; without one, the packaged model")
    parser.add_argument("--llama-cpp", type=Path, default=os.environ.get("LLAMA_CPP") or None, metavar="DIR")
    parser.add_argument("--llama-server", default="", metavar="OPTIONS", help="as --llama-server=--no-repack")
    parser.add_argument("--peer-file", type=Path, help="llama.cpp serves this file too, its best one")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of the environment that has vLLM")
    parser.add_argument("--hf", type=Path, metavar="FOLDER", help="the model for vLLM")
    parser.add_argument("--jinn", default="", metavar="OPTIONS", help="more options of `jinn serve`")
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/serving"), help="writes OUT.md and OUT.json")
    return parser.parse_args()


def main() -> None:
    from jinn.weights.model_store import resolve_model

    options = parse_arguments()
    model = resolve_model(str(options.model) if options.model else None)
    servers, not_run = servers_of(options, model)
    found = alternate(servers, options.rounds, options.clients)
    table = markdown(model.name, options.threads, found, not_run)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps({"rounds": found, "not_run": not_run}, indent=1))
    options.out.with_suffix(".md").write_text(table)
    print(table, end="")


if __name__ == "__main__":
    main()
