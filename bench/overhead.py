"""What the API's comforts cost: output tokens per second of 16 clients, with them and without, in turn.

Two servers of one build run side by side, one of them idle: the plain one has no keys and logs errors only;
the other checks named keys from a file, writes its access log, and its metrics are read each second. On the
plain one the same clients also ask for answers that a JSON schema holds. Figures are medians over rounds, the
ratios those of a round's two figures.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from statistics import median

from serving import Server, Texts, throughput

KEY = "a-key-of-16-letters-or-more"
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 1000}  # no answer ends by itself
SCHEMA = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": NUMBERS}}


async def with_metrics(port: int, texts: Texts, num_clients: int) -> float:
    """`throughput` with a key, while the metrics are read each second."""

    async def scrape() -> None:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = f"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n".encode())
            if b" 200 " not in await reader.readline():
                raise RuntimeError("the metrics cannot be read")
            await reader.read()
            writer.close()
            await writer.wait_closed()
            await asyncio.sleep(1)

    scraping = asyncio.create_task(scrape())
    try:
        return await throughput(port, texts, num_clients, key=KEY)
    finally:
        scraping.cancel()
        with suppress(asyncio.CancelledError):
            await scraping


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a .gguf file; without one, the packaged model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    rounds: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text(f"someone {KEY}\n")
        keys.chmod(0o600)
        command = [str(Path(sys.executable).with_name("jinn")), "serve"]
        command += [*([options.model] if options.model else []), "--port", "{port}"]
        plain = Server("plain", (*command, "--log-level", "error"), "/ready")
        full = Server("full", (*command, "--api-keys", str(keys), "--log-level", "info"), "/ready")
        with plain.run() as plain_run, full.run() as full_run:
            for number in range(options.rounds + 1):
                texts = Texts(number)
                without = asyncio.run(throughput(plain_run.port, texts, options.clients))
                comforts = asyncio.run(with_metrics(full_run.port, texts, options.clients))
                held = throughput(plain_run.port, texts, options.clients, response_format=SCHEMA)
                rounds.append((without, comforts, asyncio.run(held)))
                print(
                    f"round {number}: " + ", ".join(f"{speed:.1f}" for speed in rounds[-1]), file=sys.stderr
                )
    del rounds[0]  # it warms up
    print(f"plain: {median(plain for plain, _, _ in rounds):.1f} tokens/s, {options.clients} clients")
    print(f"keys, metrics and logs: {median(full / plain for plain, full, _ in rounds):.1%} of it")
    print(f"held to a JSON schema: {median(held / plain for plain, _, held in rounds):.1%} of it")


if __name__ == "__main__":
    main()
