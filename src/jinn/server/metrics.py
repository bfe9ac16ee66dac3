"""Prometheus metrics under `jinn:`, with the names that vLLM's dashboards use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jinn.engine.messages import EngineStats

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
_LONG_SECONDS = (*_SECONDS[5:], 30.0, 40.0, 60.0, 120.0, 240.0, 480.0, 960.0)


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a request's time; both ends are time.monotonic()."""

    name: str  # queue | prefill | decode
    start: float
    end: float


class Metrics:
    """The counters and clocks of one server, in a registry of its own."""

    def __init__(self, model_name: str, engine_stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model_name, engine_stats))
        self._model_name = model_name
        self._finished = Counter(
            "jinn:request_success",
            "Choices that ended, by how.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        for reason in ("stop", "length", "tool_calls", "abort", "error"):
            self._finished.labels(model_name, reason)
        self.time_to_first_token = self._histogram("time_to_first_token", "Arrival to first token.")
        self.inter_token_latency = self._histogram("inter_token_latency", "Between two tokens of a choice.")
        self.e2e_latency = self._histogram("e2e_request_latency", "Arrival to last token.", _LONG_SECONDS)
        self.queue_time = self._histogram("request_queue_time", "Arrival to first computed token.")
        self.prefill_time = self._histogram("request_prefill_time", "First computed to first new token.")
        self.decode_time = self._histogram("request_decode_time", "First to last new token.", _LONG_SECONDS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        histogram = Histogram(
            f"jinn:{name}_seconds", text, ("model_name",), registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model_name)

    def start_request(self, arrived_at: float) -> RequestTimer:
        """The clock of a request that arrived at `arrived_at` on the monotonic clock."""
        return RequestTimer(self, arrived_at)

    def count_finish(self, reason: str) -> None:
        self._finished.labels(self._model_name, reason).inc()


class RequestTimer:
    """The clock of one request."""

    def __init__(self, metrics: Metrics, arrived_at: float) -> None:
        self._metrics = metrics
        self._arrived_at = arrived_at
        self._prefill_at: float | None = None
        self._first_token_at: float | None = None
        self._last_token_at: dict[int, float] = {}  # by choice

    def computed(self, step_seconds: float) -> None:
        """A step that took so long worked for the request; with the first, its time in the queue ended."""
        if self._prefill_at is None:
            self._prefill_at = max(time.monotonic() - step_seconds, self._arrived_at)
            self._metrics.queue_time.observe(self._prefill_at - self._arrived_at)

    def tokens_arrived(self, index: int, num_tokens: int) -> None:
        now = time.monotonic()
        last = self._last_token_at.get(index)
        self._last_token_at[index] = now
        if last is not None and num_tokens:
            self._metrics.inter_token_latency.observe((now - last) / num_tokens)
        if self._first_token_at is None:
            self._first_token_at = now
            self._metrics.time_to_first_token.observe(now - self._arrived_at)
            self._metrics.prefill_time.observe(now - (self._prefill_at or now))

    @property
    def phases(self) -> list[Phase]:
        """What has been gone through so far; the last one ends now, or with the last token."""
        ends = {
            "queue": self._prefill_at,
            "prefill": self._first_token_at,
            "decode": max(self._last_token_at.values(), default=None),
        }
        phases, start = [], self._arrived_at
        for name, end in ends.items():
            phases.append(Phase(name, start, time.monotonic() if end is None else end))
            if end is None:
                break
            start = end
        return phases

    def finish(self) -> None:
        now = time.monotonic()
        self._metrics.e2e_latency.observe(now - self._arrived_at)
        if self._first_token_at is not None:
            self._metrics.decode_time.observe(now - self._first_token_at)


class _EngineCollector(Collector):
    """Reads the engine's own counts when Prometheus asks."""

    def __init__(self, model_name: str, engine_stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._engine_stats = engine_stats

    def collect(self) -> Iterator[Metric]:
        stats = self._engine_stats()
        yield self._gauge("num_requests_running", "Sequences in the batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait for room.", stats.num_waiting)
        usage = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("kv_cache_usage_perc", "Share of cache blocks held by sequences, 0 to 1.", usage)
        yield self._gauge("num_state_snapshots", "Recurrent states kept for reuse.", stats.num_snapshots)
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.num_prefix_queries),
            ("prefix_cache_hits", "Prompt tokens read from the cache.", stats.num_cached_tokens),
            (
                "prompt_tokens",
                "Prompt tokens, computed or read from the cache.",
                stats.num_prompt_tokens + stats.num_cached_tokens,
            ),
            ("generation_tokens", "Tokens generated.", stats.num_generation_tokens),
            ("num_preemptions", "Sequences sent back to wait.", stats.num_preemptions),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("spec_decode_num_drafts", "Times that drafts were checked.", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Drafts checked.", stats.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Drafts that were right.", stats.num_accepted_tokens),
        ):
            family = CounterMetricFamily(f"jinn:{name}", text, labels=("model_name",))
            family.add_metric((self._model_name,), value)
            yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"jinn:{name}", text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family
