"""Its place makes the modules beside it (tiny.py, same_bytes.py) importable from every test."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jinn.weights.errors import WeightsError
from jinn.weights.model_store import resolve_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the whole of the long sweeps")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --soak, tests marked `soak` are left out."""
    if config.getoption("--soak"):
        return
    soaks = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=soaks)
    items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The packaged SmolLM2-135M-Instruct, Q4_1."""
    try:
        return resolve_model(None)
    except WeightsError as error:
        pytest.skip(str(error))


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a background job, which starts with the signal ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()  # hypothesis is called at collections, where an interrupt is lost
    yield
    gc.enable()
    signal.signal(signal.SIGINT, handler)
