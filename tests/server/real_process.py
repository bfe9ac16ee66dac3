"""`jinn serve` whose API process tells what it holds: `python real_process.py ARGUMENTS`.

On SIGUSR1 it prints one JSON object: its asyncio tasks, and its requests that still live.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal

from jinn.cli.main import main


def report(*_: object) -> None:
    from jinn.server.generation import Generation

    gc.collect()
    num_requests = sum(isinstance(held, Generation) for held in gc.get_objects())
    print(json.dumps({"tasks": len(asyncio.all_tasks()), "requests": num_requests}), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, report)
    main()
