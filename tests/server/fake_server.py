"""A whole server around the fake engine, as a process: `python fake_server.py DRAIN_SECONDS`.

Prints its port, and after shutdown what is left.
"""

from __future__ import annotations

import asyncio
import sys

from fakes import ByteTokenizer, FakeEngine, encode_chat

from jinn.logs import configure_logging
from jinn.server.app import App
from jinn.server.config import ServerConfig
from jinn.server.listener import listen
from jinn.server.models import Models
from jinn.server.serve import bind
from jinn.server.service import Service


async def main() -> None:
    configure_logging("info")
    engine = FakeEngine(step_seconds=0.02)
    config = ServerConfig(drain_seconds=float(sys.argv[1]), allowed_hosts=("*",))
    service = Service(config, engine, ByteTokenizer(), encode_chat, file_name="tiny.gguf")
    listener = bind("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    models = Models.of(service)
    await listen(App(models), models, listener)
    print(f"running={len(engine.running)} tasks={len(asyncio.all_tasks()) - 1}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
