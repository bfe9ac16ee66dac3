"""The clock of a request."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from jinn.engine.messages import EngineStats
from jinn.server import metrics as metrics_module
from jinn.server.metrics import Metrics


def total(registry: CollectorRegistry, name: str) -> float | None:
    return registry.get_sample_value(f"jinn:{name}_seconds_sum", {"model_name": "m"})


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one item is what the clock shows."""
    clock = [10.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    return clock


def test_the_queue_ends_where_the_first_step_began(now: list[float]) -> None:
    metrics = Metrics("m", EngineStats)
    timer = metrics.start_request(now[0])
    now[0] = 13.0
    timer.computed(step_seconds=1.0)  # read a part of the prompt
    now[0] = 15.0
    timer.computed(step_seconds=1.5)
    timer.tokens_arrived(0, 1)
    now[0] = 15.5
    timer.tokens_arrived(0, 1)
    timer.finish()
    assert total(metrics.registry, "request_queue_time") == 2.0
    assert total(metrics.registry, "request_prefill_time") == 3.0
    assert total(metrics.registry, "time_to_first_token") == 5.0
    assert total(metrics.registry, "inter_token_latency") == 0.5
    assert total(metrics.registry, "request_decode_time") == 0.5
    assert total(metrics.registry, "e2e_request_latency") == 5.5


def test_a_prompt_read_in_one_step(now: list[float]) -> None:
    metrics = Metrics("m", EngineStats)
    timer = metrics.start_request(now[0])
    now[0] = 10.5
    timer.computed(step_seconds=0.75)  # the step began before the request arrived, says a coarse clock
    timer.tokens_arrived(0, 1)
    assert total(metrics.registry, "request_queue_time") == 0.0
    assert total(metrics.registry, "request_prefill_time") == 0.5
