"""What one instance can serve: time to read a prompt, time of a step, memory, and the load it can take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from jinn.plan.shapes import Shape
from jinn.plan.speed import ACTIVATION_BYTES, Machine, Placement, Step, step_seconds, total

RESERVED = 0.08  # of a chip's memory: runtime, communication buffers, fragmentation


@dataclass(frozen=True, slots=True)
class Workload:
    """What requests are like; `variation` is the standard deviation of lengths over their mean."""

    input_tokens: float
    output_tokens: float
    cached_share: float = 0.0
    variation: float = 0.0

    @property
    def new_tokens(self) -> float:
        """Input tokens that the prefix cache does not have."""
        return self.input_tokens * (1 - self.cached_share)

    @property
    def prefill_context(self) -> float:
        """Positions that a new token sees: those cached and half the new, longer prompts weighted."""
        return self.input_tokens * self.cached_share + self.new_tokens * (1 + self.variation**2) / 2

    @property
    def decode_context(self) -> float:
        """Positions of a sequence half-way through its answer."""
        return self.input_tokens + self.output_tokens / 2


@dataclass(frozen=True, slots=True)
class Drafting:
    """Speculation: drafts per step, and the probability that one is right if those before it were."""

    num_drafts: int = 0
    acceptance: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Of one sequence: 1 + a + a^2 + ... + a^n."""
        return sum(self.acceptance**i for i in range(self.num_drafts + 1))


@dataclass(frozen=True)
class Instance:
    """A model on some chips, with an engine that reads at most `chunk` tokens of prompts in one step."""

    shape: Shape
    machine: Machine
    placement: Placement
    chunk: int = 8192
    drafting: Drafting = Drafting()
    _known: dict[Step, dict[str, float]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def step_times(self, step: Step) -> dict[str, float]:
        """`step_seconds` of this instance, remembered: searches ask for the same steps again and again."""
        if step not in self._known:
            self._known[step] = step_seconds(self.shape, self.machine, self.placement, step)
        return self._known[step]

    def prefill_times(self, workload: Workload, num_tokens: float | None = None) -> Mapping[str, float]:
        """Seconds of a full step of prompts (or of `num_tokens`), by kind."""
        tokens = self.chunk if num_tokens is None else min(num_tokens, self.chunk)
        num_seqs = max(1.0, tokens / workload.new_tokens)
        return self.step_times(Step.prefill(tokens, workload.prefill_context, num_seqs))

    def prefill_rate(self, workload: Workload) -> float:
        """New input tokens per second of the instance that does nothing else; stages are always busy."""
        ranks, stages = self.placement.dp, self.placement.pp
        return ranks * stages * self.chunk / total(self.prefill_times(workload))

    def prompt_seconds(self, workload: Workload, new_tokens: float | None = None) -> float:
        """To read one prompt that does not wait: its chunks follow each other through the stages.

        With p stages and m chunks that takes (m + p - 1) / p passes: the bubble is (p - 1) / (m + p - 1).
        """
        tokens = workload.new_tokens if new_tokens is None else new_tokens
        chunks = max(1, math.ceil(tokens / self.chunk))
        one_pass = total(self.prefill_times(workload, tokens / chunks))
        stages = self.placement.pp
        return one_pass * (chunks + stages - 1) / stages if chunks > 1 else one_pass

    def decode_times(self, num_seqs: float, context: float) -> dict[str, float]:
        """Seconds of a step of a rank's `num_seqs` sequences, by kind; stages work on a part of them each."""
        part = max(1.0, num_seqs / self.placement.pp)
        tokens = 1 + self.drafting.num_drafts
        times = dict(self.step_times(Step.decode(part, context, tokens)))
        if self.drafting.num_drafts:
            # a draft is one layer and the head, for one token of each sequence
            one = self.step_times(Step.decode(part, context))
            layer = (total(one) - one["head"]) / self.shape.work.num_layers
            times["drafts"] = self.drafting.num_drafts * (layer + one["head"])
        return times

    def token_seconds(self, num_seqs: float, context: float) -> float:
        """Between two tokens of a sequence, while no prompt is read."""
        return total(self.decode_times(num_seqs, context)) / self.drafting.tokens_per_step

    def decode_rate(self, num_seqs: float, context: float) -> float:
        """Tokens per second of the instance, with `num_seqs` sequences in each rank."""
        return self.placement.dp * num_seqs / self.token_seconds(num_seqs, context)

    def added_seconds(self, workload: Workload, num_seqs: float, num_prompts: float) -> float:
        """What a prompt adds to the steps of a rank, where `num_prompts` share a step if the chunk allows.

        Prompts take their own time, but weights are read only once for them and the running sequences.
        """
        tokens = min(float(self.chunk), num_prompts * workload.new_tokens)
        decode = self.decode_times(num_seqs, workload.decode_context)
        shared = total(decode) - decode["attention"] - decode["recurrence"]
        alone = total(self.prefill_times(workload, tokens))
        return max(alone - shared, 0.1 * alone) / self.placement.pp * workload.new_tokens / tokens

    @cached_property
    def memory_parts(self) -> dict[str, float]:
        """Bytes of the fullest chip, without what sequences keep."""
        tp, pp, dp = self.placement.tp, self.placement.pp, self.placement.dp
        experts_split = tp * dp if self.placement.ep > 1 else tp
        weights = 0.0
        for layer in self.shape.work.layers:
            for matrix in layer.matrices:
                split = experts_split if matrix.is_expert else 1 if matrix.parallel == "replicated" else tp
                weights += layer.count * matrix.num_bytes / split
            weights += layer.count * layer.vector_bytes
        stage = math.ceil(self.shape.work.num_layers / pp) / self.shape.work.num_layers
        head, embedding = self.shape.work.head.num_bytes, self.shape.work.embedding_bytes
        ends = max(head, embedding) if pp > 1 else head + embedding
        inner = max(
            sum(matrix.active * (matrix.rows + matrix.cols) for matrix in layer.matrices)
            for layer in self.shape.work.layers
        )
        activations = self.chunk * ACTIVATION_BYTES * (8 * self.shape.work.hidden_size + inner / tp)
        return {"weights": weights * stage + ends / tp, "activations": activations}

    def sequence_bytes(self, positions: float) -> float:
        """What one sequence keeps on each chip of its rank."""
        tp, pp = self.placement.tp, self.placement.pp
        num_bytes = self.shape.state_bytes_per_sequence / tp
        for layer in self.shape.work.layers:
            if layer.kv is not None:
                split = min(tp, layer.kv.num_kv_heads)
                num_bytes += layer.count * self.shape.layer_kv_bytes(layer.kv) / split * positions
        return num_bytes / pp

    def memory(self, num_seqs: float, positions: float) -> dict[str, float]:
        """Bytes of the fullest chip by kind; they add up to what is needed."""
        reserved = RESERVED * self.machine.chip.fact("memory")
        return {
            **self.memory_parts,
            "sequences": num_seqs * self.sequence_bytes(positions),
            "reserved": reserved,
        }

    def max_num_seqs(self, positions: float) -> float:
        """Sequences that a rank has room for; below 1 the model does not fit."""
        free = self.machine.chip.fact("memory") - sum(self.memory(0, positions).values())
        return free / self.sequence_bytes(positions)


@dataclass(frozen=True, slots=True)
class Load:
    """A rank under `request_rate`: what runs at a time, and the seconds between a sequence's tokens."""

    request_rate: float
    num_seqs: float
    token_seconds: float
    prefill_share: float  # of the time


def shared_load(instance: Instance, workload: Workload, request_rate: float) -> Load | None:
    """A rank that reads and generates under a given rate; None where it cannot keep up.

    By Little's law B = rate * output_tokens * seconds per token, and prompts take their share of the time:
    seconds per token = step(B) / (1 - rate * what a prompt adds). Solved by iteration.
    """
    num_seqs, token, share = 1.0, 0.0, 0.0
    for _ in range(200):
        step = instance.token_seconds(num_seqs, workload.decode_context)
        share = request_rate * instance.added_seconds(workload, num_seqs, 1 + request_rate * step)
        if share >= 1:
            return None
        token = step / (1 - share)
        following = max(1e-3, request_rate * workload.output_tokens * token)
        if following > 1e6:
            return None
        if abs(following - num_seqs) < 1e-4 * num_seqs:
            break
        num_seqs = (num_seqs + following) / 2
    return Load(request_rate, num_seqs, token, share)


def full_load(instance: Instance, workload: Workload, num_seqs: float) -> Load:
    """The load of a rank with `num_seqs` sequences always running: rate = B / (O * step + B * added)."""
    step = instance.token_seconds(num_seqs, workload.decode_context)
    added = instance.added_seconds(workload, num_seqs, instance.chunk / workload.new_tokens)
    rate = num_seqs / (workload.output_tokens * step + num_seqs * added)
    return Load(rate, num_seqs, step / (1 - rate * added), rate * added)
