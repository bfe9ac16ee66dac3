"""Published measurements, and what the planner says of the same set-up. docs/plan.md shows the table."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from jinn.plan.chips import find_chip
from jinn.plan.efficiency import find_efficiency
from jinn.plan.queueing import first_token
from jinn.plan.serving import Instance, Workload, shared_load
from jinn.plan.shapes import shape_of
from jinn.plan.speed import Machine, Placement
from jinn.plan.tables import read
from jinn.plan.training import TrainScenario, plan_training


@dataclass(frozen=True)
class Row:
    name: str
    figure: str
    unit: str
    measured: float
    predicted: float
    is_calibrated: bool

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def instance(model, chip, engine, precision, placement, chunk=16384):
    shape = shape_of(model, precision)
    known = find_chip(chip)
    machine = Machine(known, find_efficiency(known.name, engine, shape.architecture, precision))
    return Instance(shape, machine, placement, chunk)


def throughput_rows():
    """InferSim's README: DeepSeek's profile data, and SGLang on H20; prompts of 4,096 tokens."""
    setups = [
        # model, chip, engine, precision, (prefill placement, tok/s, calibrated),
        # (decode placement, sequences, tokens of an answer, tok/s, calibrated)
        ("DeepSeek-V3", "H800", "deepseek", "fp8", (Placement(dp=32, ep=32), 7839, True),
         (Placement(dp=128, ep=128), 128, 1786, 2324, True)),
        ("Qwen3-30B-A3B", "H20", "sglang", "bf16", (Placement(), 16594, False),
         (Placement(dp=4, ep=4), 100, 2048, 2749, False)),
        ("Qwen3-8B", "H20", "sglang", "fp8", (Placement(), 15061, True), (Placement(), 64, 2048, 2682, True)),
    ]  # fmt: skip
    for model, chip, engine, precision, (reading, prefill, is_calibrated), decode in setups:
        read_by = instance(model, chip, engine, precision, reading)
        rate = read_by.prefill_rate(Workload(4096, 1)) / reading.chips
        name = f"{model} {precision}, {chip}, {engine}"
        yield Row(f"{name}, {reading}", "prefill", "tokens/s a chip", prefill, rate, is_calibrated)
        placement, num_seqs, answer, measured, is_calibrated = decode
        generated_by = instance(model, chip, engine, precision, placement)
        rate = generated_by.decode_rate(num_seqs, 4096 + answer / 2) / placement.chips
        yield Row(f"{name}, {placement}", "decode", "tokens/s a chip", measured, rate, is_calibrated)


def latency_rows():
    """vLLM on H100 under random arrivals: ground truth that inference simulators are compared with."""
    setups = [
        ("Llama-2-7B", 1, 5.0, 566, 247, 25.0, 9.26, True),
        ("Llama-3.1-70B", 4, 2.5, 547, 248, 52.0, 17.08, False),
        ("Qwen2.5-7B", 1, 6.0, 750, 251, 26.7, 7.02, False),
    ]
    for model, tp, rate, prompt, answer, ttft, itl, is_calibrated in setups:
        one = instance(model, "H100", "vllm", "bf16", Placement(tp=tp), 8192)
        workload = Workload(prompt, answer)
        load = shared_load(one, workload, rate)
        wait = first_token(one, workload, rate, load.num_seqs)
        name = f"{model} bf16, H100, vllm, {Placement(tp=tp)}, {rate:g} requests/s"
        yield Row(name, "first token", "ms", ttft, wait.mean * 1e3, is_calibrated)
        yield Row(name, "between tokens", "ms", itl, load.token_seconds * 1e3, is_calibrated)


def training_rows():
    deepseek = {
        "model": {"name": "DeepSeek-V3", "precision": "fp8"},
        "chip": "H800",
        "run": {"tokens": "14.8e12 tokens", "sequence": 4096, "batch": "62.9e6 tokens"},
        "parallel": {"chips": 2048, "pp": 16, "ep": 64},
    }
    plan = plan_training(read(TrainScenario, deepseek))
    hours = plan.chip_hours / 14.8 / 1e3
    yield Row("DeepSeek-V3, 2,048 H800", "training", "1,000 h per T tokens", 180, hours, True)
    llama = {
        "model": {"name": "Llama-3.1-405B"},
        "chip": "H100",
        "run": {"tokens": "15.6e12 tokens", "sequence": 8192, "batch": "16e6 tokens"},
        "parallel": {"chips": 16384, "tp": 8, "pp": 16, "virtual_stages": 7},
    }
    plan = plan_training(read(TrainScenario, llama))
    yield Row(
        "Llama-3.1-405B, 16,384 H100", "training", "TFLOPS a chip", 400, plan.flops_per_chip / 1e12, True
    )
    yield Row("Llama-3.1-405B, 16,384 H100", "training", "M chip hours", 30.84, plan.chip_hours / 1e6, False)


def rows():
    return [*throughput_rows(), *latency_rows(), *training_rows()]


def table(found):
    lines = ["| set-up | figure | measured | predicted | error | row |", "|---|---|---|---|---|---|"]
    for row in found:
        use = "calibrated" if row.is_calibrated else "blind"
        lines.append(
            f"| {row.name} | {row.figure}, {row.unit} | {row.measured:,g} | {row.predicted:,.4g} "
            f"| {row.error:+.1%} | {use} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    found = rows()
    print(table(found))
    print("median", median(abs(row.error) for row in found))
