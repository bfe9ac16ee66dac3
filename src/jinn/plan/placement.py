"""Searches how to split a model over chips: the fewest that meet the targets, and why not others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jinn.plan.queueing import first_token
from jinn.plan.serving import Drafting, Instance, Load, Workload, full_load
from jinn.plan.shapes import Shape
from jinn.plan.speed import Machine, Placement
from jinn.plan.units import duration, short

SIZES = tuple(2**power for power in range(11))


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What users are promised; `load` is the share of an instance's capacity that is used at the peak."""

    first_token: float | None = None  # seconds, at `percentile`
    token: float | None = None  # mean seconds between tokens
    percentile: float = 0.95
    load: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An instance that meets the targets, and what one chip of it does.

    In a shared pool `load` is a rank's; in separate pools it is the generating one's, and readers have none.
    """

    instance: Instance
    num_seqs: float  # of each rank, at full load
    load: Load | None
    first_token: float  # seconds at the targets' percentile
    memory: dict[str, float]
    input_rate: float  # new tokens per second of the instance, if it did nothing else
    output_rate: float

    @property
    def chips(self) -> int:
        return self.instance.placement.chips


@dataclass(frozen=True, slots=True)
class Rejection:
    """A placement that will not do, and why."""

    placement: Placement
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What is searched: a model on a machine, for a workload."""

    shape: Shape
    machine: Machine
    workload: Workload
    targets: Targets
    chunk: int
    max_num_seqs: int
    max_chips: int
    drafting: Drafting = Drafting()
    request_rate: float = 0.0  # of the whole fleet at its peak: ranks that share a queue wait less

    def instance(self, placement: Placement) -> Instance:
        return Instance(self.shape, self.machine, placement, self.chunk, self.drafting)

    def check(self, placement: Placement) -> str | None:
        """Why a placement is impossible, whatever the load."""
        heads = max((layer.kv.num_kv_heads for layer in self.shape.work.layers if layer.kv), default=1)
        chip = self.machine.chip
        experts = [m for layer in self.shape.work.layers for m in layer.matrices if m.is_expert]
        if placement.pp > self.shape.work.num_layers:
            return f"PP{placement.pp} is more than {self.shape.work.num_layers} layers"
        if placement.tp > chip.scaleup_size:
            return f"TP{placement.tp} leaves the {chip.scaleup_size} chips that the fast network joins"
        if placement.ep > 1 and not experts:
            return f"EP{placement.ep}, but the model has no experts"
        if placement.ep > 1 and placement.ep != placement.tp * placement.dp:
            return f"EP{placement.ep} is not TP x DP = {placement.tp * placement.dp}"
        if experts and placement.ep > experts[0].copies:
            return f"EP{placement.ep} is more than {experts[0].copies} experts"
        if placement.dp > 1 and placement.ep == 1:
            return f"DP{placement.dp} without EP is as many instances"
        if placement.tp > 8 * heads and not experts:
            return f"TP{placement.tp} would keep each of {heads} key-value heads more than 8 times"
        if placement.chips > 1 and not chip.has("scaleup"):
            return f"{placement} needs {chip.name}'s scaleup bandwidth, which is not known"
        if placement.chips > chip.scaleup_size and not chip.has("scaleout"):
            return f"{placement} needs {chip.name}'s scaleout bandwidth, which is not known"
        return None

    def placements(self) -> Iterator[Placement]:
        """All splits of up to `max_chips`, in powers of two."""
        has_experts = any(m.is_expert for layer in self.shape.work.layers for m in layer.matrices)
        for tp in SIZES:
            for pp in SIZES:
                for dp in SIZES if has_experts else (1,):
                    if tp * pp * dp <= self.max_chips:
                        yield Placement(tp, pp, dp, tp * dp if has_experts and tp * dp > 1 else 1)

    def shared(self, placement: Placement) -> Choice | Rejection:
        """An instance that reads and generates, at the most sequences that the targets leave."""
        fitting = self._fitting(placement)
        return fitting if isinstance(fitting, Rejection) else self._largest(*fitting)

    def _fitting(self, placement: Placement) -> tuple[Instance, int] | Rejection:
        """An instance, and the most sequences of a rank that its memory and the settings leave room for."""
        reason = self.check(placement)
        if reason:
            return Rejection(placement, reason)
        instance, positions = self.instance(placement), self.workload.decode_context
        most = instance.max_num_seqs(positions)
        if most < 1:
            need = sum(instance.memory(1, positions).values())
            has = instance.machine.chip.fact("memory")
            return Rejection(
                placement, f"one sequence needs {short(need)}B of memory per chip, which has {short(has)}B"
            )
        return instance, min(int(most), self.max_num_seqs)

    def _largest(self, instance: Instance, most: int) -> Choice | Rejection:
        """The most sequences whose choice meets the targets: throughput and times both grow with them."""
        best = self._choice(instance, 1)
        if isinstance(best, Rejection):
            return best
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            choice = self._choice(instance, middle)
            if isinstance(choice, Choice):
                low, best = middle, choice
            else:
                high = middle - 1
        return best

    def _choice(self, instance: Instance, num_seqs: int) -> Choice | Rejection:
        load = full_load(instance, self.workload, num_seqs)
        token_target, targets = self.targets.token, self.targets
        if token_target is not None and load.token_seconds > token_target:
            return Rejection(
                instance.placement,
                f"{duration(load.token_seconds)} between tokens with {num_seqs} sequences, "
                f"more than {duration(token_target)}",
            )
        ranks = instance.placement.dp
        seconds = self._first_token(instance, load.request_rate * targets.load, num_seqs * targets.load)
        if rejection := self._late(instance.placement, seconds):
            return rejection
        return Choice(
            instance=instance,
            num_seqs=num_seqs,
            load=load,
            first_token=seconds,
            memory=instance.memory(num_seqs, self.workload.decode_context),
            # both kinds of work share the time: each rate is what the instance would do of one alone
            input_rate=ranks * load.request_rate * self.workload.new_tokens / max(load.prefill_share, 1e-12),
            output_rate=ranks
            * load.request_rate
            * self.workload.output_tokens
            / max(1 - load.prefill_share, 1e-12),
        )

    def _first_token(self, instance: Instance, request_rate: float, num_seqs: float) -> float:
        """Seconds to it at the targets' percentile where each rank takes `request_rate`.

        Ranks share a queue: the fleet's, or one instance's.
        """
        ranks = max(instance.placement.dp, min(1000, int(self.request_rate / request_rate)))
        wait = first_token(instance, self.workload, request_rate * ranks, num_seqs, ranks)
        return wait.percentile(self.targets.percentile) if wait else float("inf")

    def _late(self, placement: Placement, seconds: float) -> Rejection | None:
        """The rejection of what takes so long to the first token, if that is too long."""
        target = self.targets.first_token
        if target is None or seconds <= target:
            return None
        return Rejection(
            placement,
            f"{duration(seconds)} to the first token at {self.targets.percentile:.0%}, "
            f"more than {duration(target)}",
        )

    def reading(self, placement: Placement) -> Choice | Rejection:
        """An instance that only reads prompts and hands their keys and values over."""
        fitting = self._fitting(placement)
        if isinstance(fitting, Rejection):
            return fitting
        instance, _ = fitting
        rate = instance.prefill_rate(self.workload)
        request_rate = self.targets.load * rate / self.workload.new_tokens / placement.dp
        handed = self.workload.input_tokens * self.shape.kv_bytes_per_token
        seconds = self._first_token(instance, request_rate, 0) + self._handover(handed)
        if rejection := self._late(placement, seconds):
            return rejection
        return Choice(
            instance=instance,
            num_seqs=0,
            load=None,
            first_token=seconds,
            memory=instance.memory(1, self.workload.input_tokens),
            input_rate=rate,
            output_rate=0.0,
        )

    def _handover(self, num_bytes: float) -> float:
        chip = self.machine.chip
        name = "scaleout" if chip.has("scaleout") else "scaleup"
        return num_bytes / (chip.fact(name) * self.machine.efficiency.link)

    def generating(self, placement: Placement) -> Choice | Rejection:
        """An instance that only generates."""
        fitting = self._fitting(placement)
        return fitting if isinstance(fitting, Rejection) else self._most_generating(*fitting)

    def _most_generating(self, instance: Instance, most: int) -> Choice | Rejection:
        context, target = self.workload.decode_context, self.targets.token
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            if target is None or instance.token_seconds(middle, context) <= target:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            seconds = instance.token_seconds(1, context)
            return Rejection(
                instance.placement,
                f"{duration(seconds)} between tokens with 1 sequence, more than {duration(target or 0.0)}",
            )
        seconds = instance.token_seconds(low, context)
        rate = low / (self.workload.output_tokens * seconds)
        return Choice(
            instance=instance,
            num_seqs=low,
            load=Load(rate, low, seconds, 0.0),
            first_token=0.0,
            memory=instance.memory(low, context),
            input_rate=0.0,
            output_rate=instance.decode_rate(low, context),
        )


@dataclass(frozen=True, slots=True)
class Found:
    """The best of a search, and what was rejected; `best` is None if all were."""

    best: Choice | None
    rejected: tuple[Rejection, ...]
    num_tried: int


def best_shared(search: Search, fixed: Placement | None = None) -> Found:
    """The most requests per chip."""
    workload = search.workload

    def worth(choice: Choice) -> float:
        per_request = workload.new_tokens / choice.input_rate + workload.output_tokens / choice.output_rate
        return 1 / (per_request * choice.chips)

    return _best([search.shared(placement) for placement in _candidates(search, fixed)], worth)


def best_separate(
    search: Search, fixed_reading: Placement | None = None, fixed_generating: Placement | None = None
) -> tuple[Found, Found]:
    """The most tokens per chip of each of the two pools."""
    reading = [search.reading(placement) for placement in _candidates(search, fixed_reading)]
    generating = [search.generating(placement) for placement in _candidates(search, fixed_generating)]
    return (
        _best(reading, lambda choice: choice.input_rate / choice.chips),
        _best(generating, lambda choice: choice.output_rate / choice.chips),
    )


def _candidates(search: Search, fixed: Placement | None) -> Iterator[Placement]:
    return iter((fixed,)) if fixed is not None else search.placements()


def _best(results: list[Choice | Rejection], worth: Callable[[Choice], float]) -> Found:
    choices = [result for result in results if isinstance(result, Choice)]
    rejected = tuple(result for result in results if isinstance(result, Rejection))
    # of what is as good within 3%, the smaller instance: it grows in smaller steps
    best = None
    for choice in sorted(choices, key=lambda choice: choice.chips):
        if best is None or worth(choice) > 1.03 * worth(best):
            best = choice
    return Found(best, rejected, len(results))
