"""What training takes: operations, time, memory, exchange, failures, energy and money."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinn.plan.chips import Chip, ChipTable, MissingFactError, find_chip, rows
from jinn.plan.economics import JOULES_PER_KWH
from jinn.plan.scenario import ExchangeTable
from jinn.plan.shapes import Shape, shape_of
from jinn.plan.tables import ScenarioError, choice, count, flag, quantity, table, tables, text
from jinn.plan.units import CURRENCIES

RESERVED = 0.08  # of a chip's memory: runtime, buffers of exchanges, fragmentation
RECOMPUTATION = {"none": 0.0, "selective": 0.02, "full": 1.0}
"""Forward passes done again: none, of attention's scores alone, or of every block."""

# Bytes per parameter: bf16 weights, float32 sums of gradients and master weights, and optimiser moments,
# in float32 unless the name says otherwise (two for AdamW, one for Muon).
BYTES_PER_PARAMETER = {"weights": 2.0, "gradients": 4.0, "master weights": 4.0}
MOMENTS = {"adamw": 8.0, "adamw-bf16": 4.0, "muon": 4.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainModelTable:
    """[model]: its name, and the arithmetic of its matrices."""

    name: str = text()
    precision: str = choice(("bf16", "fp8"), "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTable:
    """[run]: what is trained on, and how."""

    tokens: float = quantity("tokens", positive=True)
    sequence: int = count(4096)
    batch: float = quantity("tokens", 4e6, positive=True)  # of one optimiser's step
    micro_batch: int = count(1)  # sequences of one rank at a time
    recomputation: str = choice(tuple(RECOMPUTATION), "selective")
    optimizer: str = choice(tuple(MOMENTS), "adamw")
    mfu: float | None = quantity("1", None, positive=True, high=1.0)  # bubble and recomputation included


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelTable:
    """[parallel]: chips, and how the model is split over them; what is left of `chips` is data parallel."""

    chips: int = count()
    tp: int = count(1)
    pp: int = count(1)
    cp: int = count(1)
    ep: int = count(1)
    virtual_stages: int = count(1)
    is_sharded: bool = flag(
        True
    )  # weights, gradients and moments over the data-parallel ranks (ZeRO-3, FSDP)

    def __post_init__(self) -> None:
        split = self.tp * self.pp * self.cp
        if self.chips % split:
            raise ScenarioError(f"chips {self.chips} is no multiple of tp x pp x cp = {split}")
        if self.dp % self.ep and self.ep % self.dp:
            raise ScenarioError(
                f"ep {self.ep} neither divides {self.dp} data-parallel ranks nor is a multiple"
            )

    @property
    def dp(self) -> int:
        return self.chips // (self.tp * self.pp * self.cp)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureTable:
    """[failures]: how often chips stop a run, and what that costs.

    The default is Llama 3's: 419 unexpected interruptions of 16,384 H100 in 54 days (2407.21783).
    """

    chip_mtbf: float = quantity("s", 16384 * 54 * 86400 / 419, positive=True)  # mean time between, per chip
    restart: float = quantity("s", 400.0)
    checkpoint: float = quantity("s", 10.0)  # that a checkpoint stops the run
    interval: float | None = quantity("s", None, positive=True)  # between checkpoints; None: the best


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCostTable:
    """[cost]: renting the chips, or their power if they are owned."""

    rent: float | None = quantity("$/s", None)
    chip_power: float | None = quantity("W", None)
    server_power: float = quantity("W", 150.0)  # per chip: processors, network, fans
    pue: float = quantity("1", 1.3, low=1.0, high=5.0)
    electricity: float = quantity("$/kWh", 0.08)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainScenario:
    """A whole scenario of `jinn plan train`."""

    name: str = text("train")
    currency: str = choice(CURRENCIES, "USD")
    exchange: ExchangeTable = table(ExchangeTable, ExchangeTable())
    model: TrainModelTable = table(TrainModelTable)
    chip: str = text()
    chips: tuple[ChipTable, ...] = tables(ChipTable)
    run: RunTable = table(RunTable)
    parallel: ParallelTable = table(ParallelTable)
    failures: FailureTable = table(FailureTable, FailureTable())
    cost: TrainCostTable = table(TrainCostTable, TrainCostTable())

    @property
    def dollar(self) -> float:
        """What a US dollar is worth in the scenario's currency."""
        return self.exchange.money(self.currency)["USD"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEfficiency:
    """Model FLOP utilisation of the bf16 peak, without the pipeline's bubble; keyed as serving's."""

    chip: str
    architecture: str
    precision: str
    mfu: float
    provenance: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """The run, in seconds and bytes; `memory` is of one chip and adds up."""

    scenario: TrainScenario
    shape: Shape
    chip: Chip
    efficiency: TrainingEfficiency
    flops_per_token: float
    bubble: float
    flops_per_chip: float  # per second, of the model's own operations
    step_seconds: float
    num_steps: float
    goodput: float
    interval: float  # between checkpoints
    seconds: float  # failures included
    memory: Mapping[str, float]
    energy: float | None  # joules
    cost: float | None
    cost_of: str

    @property
    def chip_hours(self) -> float:
        return self.seconds * self.scenario.parallel.chips / 3600


def training_flops(shape: Shape, sequence: int) -> float:
    """Per token, forward and backward: three times the forward pass, whose attention sees half the sequence.

    Recomputed passes are not the model's own work and do not count (MFU, PaLM's appendix B).
    """
    work = shape.work
    forward = work.head.flops
    for layer in work.layers:
        matrices = sum(matrix.flops for matrix in layer.matrices)
        forward += layer.count * (matrices + layer.expanded_flops * sequence / 2 + layer.state_flops)
    return 3 * forward


@cache
def published() -> tuple[TrainingEfficiency, ...]:
    """The rows that jinn brings."""
    return tuple(
        TrainingEfficiency(
            chip=row["chip"],
            architecture=row["architecture"],
            precision=row["precision"],
            mfu=float(row["mfu"]),
            provenance=row["provenance"],
            source=row["source"],
        )
        for row in rows("training.csv")
    )


def find_training_efficiency(chip: str, architecture: str, precision: str) -> TrainingEfficiency:
    """The most specific row: by chip, then class, then precision."""
    wanted = (chip, architecture, precision)

    def key(row: TrainingEfficiency) -> tuple[str, str, str]:
        return row.chip, row.architecture, row.precision

    candidates = [
        row
        for row in published()
        if all(own in ("*", name) for own, name in zip(key(row), wanted, strict=True))
    ]
    return max(candidates, key=lambda row: [part != "*" for part in key(row)])


def plan_training(scenario: TrainScenario) -> TrainPlan:
    """Time, memory and money of a run. Raises ScenarioError where it cannot fit or a fact is missing."""
    shape = shape_of(scenario.model.name, scenario.model.precision)
    chip = find_chip(scenario.chip, {own.name: own.chip() for own in scenario.chips})
    efficiency = _efficiency(scenario, shape, chip)
    _check(scenario, shape, chip)
    memory = training_memory(scenario, shape, chip)
    bubble = pipeline_bubble(scenario)
    flops = training_flops(shape, scenario.run.sequence)
    speed = chip.fact("bf16") * efficiency.mfu
    if scenario.run.mfu is None:
        speed *= (1 - bubble) / (1 + RECOMPUTATION[scenario.run.recomputation] / 3)
    step = scenario.run.batch * flops / (speed * scenario.parallel.chips)
    goodput, interval = expected_goodput(scenario.failures, scenario.parallel.chips)
    num_steps = scenario.run.tokens / scenario.run.batch
    seconds = num_steps * step / goodput
    energy = _energy(scenario, chip, seconds)
    cost, cost_of = _cost(scenario, chip, seconds, energy)
    return TrainPlan(
        scenario=scenario,
        shape=shape,
        chip=chip,
        efficiency=efficiency,
        flops_per_token=flops,
        bubble=bubble,
        flops_per_chip=speed,
        step_seconds=step,
        num_steps=num_steps,
        goodput=goodput,
        interval=interval,
        seconds=seconds,
        memory=memory,
        energy=energy,
        cost=cost,
        cost_of=cost_of,
    )


def _efficiency(scenario: TrainScenario, shape: Shape, chip: Chip) -> TrainingEfficiency:
    if scenario.run.mfu is None:
        return find_training_efficiency(chip.name, shape.architecture, scenario.model.precision)
    return TrainingEfficiency(
        chip=chip.name,
        architecture=shape.architecture,
        precision=scenario.model.precision,
        mfu=scenario.run.mfu,
        provenance="given",
        source="run.mfu",
    )


def _check(scenario: TrainScenario, shape: Shape, chip: Chip) -> None:
    parallel, run = scenario.parallel, scenario.run
    if parallel.pp * parallel.virtual_stages > shape.work.num_layers:
        raise ScenarioError(
            f"parallel.pp {parallel.pp} x virtual_stages {parallel.virtual_stages} is more than "
            f"{shape.work.num_layers} layers"
        )
    if parallel.tp > chip.scaleup_size:
        raise ScenarioError(
            f"parallel.tp {parallel.tp} leaves the {chip.scaleup_size} chips that the fast network joins"
        )
    if micro_batches(scenario) < 1:
        least = parallel.dp * run.micro_batch * run.sequence
        raise ScenarioError(f"run.batch {run.batch:g} is less than {least} tokens, one micro batch a rank")
    if parallel.chips > 1:
        chip.fact("scaleup")
    if scenario.model.precision == "fp8" and not chip.has("fp8"):
        raise MissingFactError(
            f"chip {chip.name!r}: fp8 is not known; train in bf16, or give it under [[chips]]"
        )


def micro_batches(scenario: TrainScenario) -> float:
    """Of one step, that each pipeline gets."""
    run, parallel = scenario.run, scenario.parallel
    return math.floor(run.batch / (parallel.dp * run.micro_batch * run.sequence))


def pipeline_bubble(scenario: TrainScenario) -> float:
    """The share of a step that stages wait: (p - 1) / (v m + p - 1), m micro batches, v virtual stages."""
    p, v = scenario.parallel.pp, scenario.parallel.virtual_stages
    return (p - 1) / (v * micro_batches(scenario) + p - 1)


def training_memory(scenario: TrainScenario, shape: Shape, chip: Chip) -> dict[str, float]:
    """Bytes of the fullest chip by kind. Raises ScenarioError where they are more than it has."""
    parallel = scenario.parallel
    experts, others = _parameters(shape)
    shards = parallel.dp if parallel.is_sharded else 1
    expert_ranks = min(parallel.ep, parallel.dp * parallel.tp)
    local = others / (parallel.tp * parallel.pp) / shards
    local += experts / (parallel.pp * max(parallel.tp, expert_ranks)) / max(1, shards * parallel.tp // max(
        parallel.tp, expert_ranks
    ))  # fmt: skip
    memory = {name: local * size for name, size in BYTES_PER_PARAMETER.items()}
    memory["optimizer"] = local * MOMENTS[scenario.run.optimizer]
    memory["activations"] = activation_bytes(scenario, shape)
    memory["reserved"] = RESERVED * chip.fact("memory")
    need = sum(memory.values())
    if need > chip.fact("memory"):
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory.items())
        raise ScenarioError(
            f"parallel: a chip needs {need / 1e9:.1f} GB of {chip.fact('memory') / 1e9:.0f} GB ({parts}); "
            "more tp, pp or ep, sharding, or recomputation would lessen that"
        )
    return memory


def _parameters(shape: Shape) -> tuple[float, float]:
    """Of experts, and all others."""
    experts = sum(
        layer.count * matrix.copies * matrix.rows * matrix.cols
        for layer in shape.work.layers
        for matrix in layer.matrices
        if matrix.is_expert
    )
    return float(experts), float(shape.work.total_parameters - experts)


def activation_bytes(scenario: TrainScenario, shape: Shape) -> float:
    """Kept for the backward pass by the first stage, which holds those of p micro batches (1F1B).

    Kept are norms' inputs and outputs and what each matrix gives; half of the latter where activation
    functions and up-projections are computed again, and only what enters each block with full recomputation.
    """
    run, parallel = scenario.run, scenario.parallel
    tokens = run.micro_batch * run.sequence / parallel.cp
    hidden = shape.work.hidden_size
    kept = 0.0
    for layer in shape.work.layers:
        if run.recomputation == "full":
            kept += layer.count * hidden
            continue
        outputs = sum(matrix.active * matrix.rows for matrix in layer.matrices)
        kept += layer.count * (4 * hidden + (outputs if run.recomputation == "none" else outputs / 2))
    num_bytes = 1 if scenario.model.precision == "fp8" else 2
    per_stage = tokens * kept * num_bytes / parallel.tp / parallel.pp
    return per_stage * min(parallel.pp, micro_batches(scenario))


def expected_goodput(failures: FailureTable, chips: int) -> tuple[float, float]:
    """The share of time that makes progress, and the seconds between checkpoints.

    Young's and Daly's interval sqrt(2 * checkpoint * MTBF) unless one is given; a failure loses half an
    interval and a restart.
    """
    mtbf = failures.chip_mtbf / chips
    interval = failures.interval or math.sqrt(2 * max(failures.checkpoint, 1e-3) * mtbf)
    writing = failures.checkpoint / (interval + failures.checkpoint)
    lost = (interval / 2 + failures.restart) / mtbf
    return (1 - writing) / (1 + lost), interval


def _energy(scenario: TrainScenario, chip: Chip, seconds: float) -> float | None:
    power = scenario.cost.chip_power
    if power is None:
        power = chip.fact("power") if chip.has("power") else None
    if power is None:
        return None
    return (power + scenario.cost.server_power) * scenario.cost.pue * scenario.parallel.chips * seconds


def _cost(
    scenario: TrainScenario, chip: Chip, seconds: float, energy: float | None
) -> tuple[float | None, str]:
    rent = scenario.cost.rent
    if rent is None and chip.has("rent"):
        rent = chip.fact("rent") * scenario.dollar
    if rent is not None:
        return rent * seconds * scenario.parallel.chips, "rent"
    if energy is not None:
        return energy / JOULES_PER_KWH * scenario.cost.electricity, "electricity alone"
    return None, "unknown"


def as_json(plan: TrainPlan) -> dict[str, Any]:
    """All of a plan, in seconds, bytes and the scenario's currency."""
    return {
        "scenario": plan.scenario.name,
        "currency": plan.scenario.currency,
        "model": plan.shape.name,
        "chip": plan.chip.name,
        "total_parameters": plan.shape.work.total_parameters,
        "active_parameters": plan.shape.work.active_parameters,
        "flops_per_token": plan.flops_per_token,
        "mfu": plan.flops_per_chip / plan.chip.fact("bf16"),
        "efficiency": {"provenance": plan.efficiency.provenance, "source": plan.efficiency.source},
        "tflops_per_chip": plan.flops_per_chip / 1e12,
        "pipeline_bubble": plan.bubble,
        "step_seconds": plan.step_seconds,
        "num_steps": plan.num_steps,
        "goodput": plan.goodput,
        "checkpoint_interval_seconds": plan.interval,
        "seconds": plan.seconds,
        "days": plan.seconds / 86400,
        "chip_hours": plan.chip_hours,
        "chip_hours_per_trillion_tokens": plan.chip_hours / plan.scenario.run.tokens * 1e12,
        "memory_per_chip": dict(plan.memory),
        "energy_kwh": None if plan.energy is None else plan.energy / JOULES_PER_KWH,
        "cost": plan.cost,
        "cost_of": plan.cost_of,
    }
