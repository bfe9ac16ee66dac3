"""The engine process on a fake model named for what it does: `python fake_process.py FD`."""

from __future__ import annotations

import os
import sys
import time

from fake_runner import EOS, FakeRunner

from jinn.engine.config import EngineConfig, ModelInfo
from jinn.engine.process import Progress, main


class SlowRunner(FakeRunner):
    def step(self, batch, rows):
        time.sleep(0.01)
        return super().step(batch, rows)


class BrokenRunner(FakeRunner):
    def step(self, batch, rows):
        return []


RUNNERS = {"slow": SlowRunner, "breaks": BrokenRunner}


def load_runner(config: EngineConfig, progress: Progress) -> tuple[FakeRunner, ModelInfo]:
    for loaded in range(0, 1001, 100):
        progress(loaded, 1000)
    if config.model == "fails":
        raise ValueError("no such model")
    if config.model == "dies":
        os._exit(3)
    runner = RUNNERS.get(config.model, FakeRunner)(4096, 32)
    return runner, ModelInfo(4096 * 32, (EOS,), "fake", ("a note",))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], load_runner))
