"""Time to the first token under random arrivals: a closed form, and a simulation of a continuous batcher.

The closed form is M/G/k with Erlang's C and Allen and Cunneen's factor for the spread of service times, and a
gamma distribution of the same mean and variance for percentiles. The simulation plays a rank step by step.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from jinn.plan.serving import Instance, Workload


@dataclass(frozen=True, slots=True)
class Wait:
    """Mean and variance of a time, and the percentiles of the gamma distribution that has them."""

    mean: float
    variance: float

    def percentile(self, share: float) -> float:
        """By Wilson and Hilferty's cube root of a gamma variable."""
        if self.mean <= 0 or self.variance <= 0:
            return self.mean
        shape = self.mean**2 / self.variance
        spread = 1 / (9 * shape)
        cube_root = 1 - spread + NormalDist().inv_cdf(share) * math.sqrt(spread)
        return self.mean * max(cube_root, 0.0) ** 3


def erlang_c(num_servers: int, load: float) -> float:
    """The probability that a request waits; `load` is in servers, less than their number."""
    if load <= 0:
        return 0.0
    blocked = 1.0
    for n in range(1, min(num_servers, 100_000) + 1):  # Erlang B by its recursion
        blocked = load * blocked / (n + load * blocked)
    share = load / num_servers
    return blocked / (1 - share * (1 - blocked))


def queue_wait(request_rate: float, service: float, variation: float, num_servers: int = 1) -> Wait | None:
    """Until a server is free; None where they cannot keep up. `variation` is of service times."""
    share = request_rate * service / num_servers
    if share >= 1:
        return None
    waits = erlang_c(num_servers, request_rate * service)
    spread = (1 + variation**2) / 2
    mean = waits * service * spread / (num_servers * (1 - share))
    variance = 2 * mean**2 / waits - mean**2 if waits > 0 else 0.0
    return Wait(mean, variance)


def first_token(
    instance: Instance,
    workload: Workload,
    request_rate: float,
    num_seqs: float,
    num_ranks: int = 1,
) -> Wait | None:
    """From a request's arrival to its first token: the queue, the rest of the step, the prompt, and overhead.

    `request_rate` is of all `num_ranks` ranks; `num_seqs` generate in each (0: a pool that only reads).
    """
    service = instance.placement.dp / instance.prefill_rate(workload) * workload.new_tokens
    wait = queue_wait(request_rate, service, workload.variation, num_ranks)
    if wait is None:
        return None
    own = instance.prompt_seconds(workload)
    decode = instance.decode_times(num_seqs, workload.decode_context) if num_seqs > 0 else {}
    step = sum(decode.values())
    beside = decode.get("attention", 0.0) + decode.get("recurrence", 0.0)
    busy = min(1.0, num_seqs)
    mean = wait.mean + busy * step / 2 + own + beside + instance.machine.efficiency.first_token
    variance = wait.variance + busy * step**2 / 12 + (own * workload.variation) ** 2
    return Wait(mean, variance)


@dataclass(frozen=True, slots=True)
class Simulated:
    """What requests met; `percentile` takes a share."""

    first_token: Sequence[float]  # sorted
    token: Sequence[float]  # seconds per further token of each request, sorted
    mean_num_seqs: float

    @staticmethod
    def percentile(values: Sequence[float], share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))]


def simulate(
    instance: Instance,
    workload: Workload,
    request_rate: float,
    max_num_seqs: int,
    num_requests: int = 1000,
    seed: int = 0,
) -> Simulated:
    """Play one rank: Poisson arrivals, lognormal lengths, prompts in chunks beside the running sequences."""
    rng = random.Random(seed)  # noqa: S311
    arrivals, now = [], 0.0
    for _ in range(num_requests):
        now += rng.expovariate(request_rate)
        new = _lognormal(rng, workload.new_tokens, workload.variation)
        arrivals.append(
            (now, max(1.0, new), max(1, round(_lognormal(rng, workload.output_tokens, workload.variation))))
        )
    return _play(instance, workload, deque(arrivals), max_num_seqs)


def _lognormal(rng: random.Random, mean: float, variation: float) -> float:
    if variation == 0:
        return mean
    sigma = math.sqrt(math.log1p(variation**2))
    return rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)


def _play(
    instance: Instance, workload: Workload, arrivals: deque[tuple[float, float, int]], max_num_seqs: int
) -> Simulated:
    prefill, decode = _step_costs(instance, workload)
    gain = instance.drafting.tokens_per_step
    waiting: deque[list[float]] = deque()  # [arrival, tokens still to read, output tokens]
    running: list[tuple[float, float, float]] = []  # (step it ends at, first token's time, output tokens)
    first, token, weight, now, step, area = [], [], 0.0, 0.0, 0.0, 0.0
    overhead = instance.machine.efficiency.first_token
    while arrivals or waiting or running:
        if not waiting and not running:
            now = max(now, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now:
            waiting.append(list(arrivals.popleft()))
        room, read = float(instance.chunk), 0.0
        done: list[list[float]] = []
        while waiting and room > 0 and len(running) + len(done) < max_num_seqs:
            taken = min(room, waiting[0][1])
            waiting[0][1] -= taken
            room, read = room - taken, read + taken
            if waiting[0][1] <= 0:
                done.append(waiting.popleft())
        full, beside = decode(len(running))
        # stages work on several steps of prompts at once: the next can start when the first stage is done
        flight = prefill(read) * (1 - 1 / instance.placement.pp) if read else 0.0
        seconds = prefill(read) - flight + beside if read else full
        now, step = now + seconds, step + gain
        weight, area = weight + seconds, area + seconds * len(running)
        while running and running[0][0] <= step:
            _, since, count = heapq.heappop(running)
            token.append((now - since) / count)
        for arrival, _, outputs in done:
            first.append(now + flight - arrival + overhead)
            if outputs > 1:
                heapq.heappush(running, (step + outputs - 1, now, outputs - 1))
    return Simulated(sorted(first), sorted(token) or [0.0], area / weight if weight else 0.0)


def _step_costs(
    instance: Instance, workload: Workload
) -> tuple[Callable[[float], float], Callable[[int], tuple[float, float]]]:
    """Seconds of reading tokens, and of a step of sequences with the part that is not shared; remembered."""
    reads: dict[int, float] = {}
    steps: dict[int, tuple[float, float]] = {}

    def prefill(num_tokens: float) -> float:
        bucket = math.ceil(num_tokens / 64)
        if bucket not in reads:
            reads[bucket] = sum(instance.prefill_times(workload, bucket * 64).values())
        return reads[bucket]

    def decode(num_seqs: int) -> tuple[float, float]:
        if num_seqs == 0:
            return 0.0, 0.0
        if num_seqs not in steps:
            times = instance.decode_times(num_seqs, workload.decode_context)
            steps[num_seqs] = sum(times.values()), times["attention"] + times["recurrence"]
        return steps[num_seqs]

    return prefill, decode
