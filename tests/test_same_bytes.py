"""A request's bytes are the same alone and in any company; the harness that says so finds planted faults."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from jinn import _native
from jinn.engine.runner import Runner
from jinn.engine.sampler import SampledToken, sample
from lora_folders import llama_linear_shapes, write_lora
from models.gguf_models import gguf_of
from models.transformers_models import random_model
from same_bytes import (
    DifferentBytesError,
    Kernels,
    Model,
    Report,
    Sizes,
    check_schedule,
    native_model,
    random_schedule,
)
from tiny import TinyLlama, tiny_llama_gguf

TINY = TinyLlama(max_position_embeddings=512, num_attention_heads=6, num_key_value_heads=2, hidden_size=96)
ADAPTERS = (None, None, "first", "second")
TINY_SIZES = Sizes(
    TINY.vocab_size, (1, 2, 3, 5, 9, 17, 33, 65), max_prompt=120, max_tokens=24, adapters=ADAPTERS
)
SMOLLM2_SIZES = Sizes(49152, (2, 3, 5, 9, 17), max_prompt=80, max_tokens=8, num_tokens=400)

HYBRIDS = {"qwen3_next": "Q8_0", "qwen3_5": "Q4_0", "qwen3_5_moe": "BF16", "deepseek_v3": "F32"}
HYBRID_SIZES = Sizes(512, (1, 2, 3, 5, 9, 17), max_prompt=100, max_tokens=16)
FORMATS = ("Q4_1", "Q8_0", "F32", "Q4_0", "BF16", "F16")
NUM_TINY, NUM_HYBRID, NUM_SMOLLM2 = 180, 160, 20
CI_SHARE = 10  # CI runs one in so many


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory) -> list[Model]:
    """One model per weight format, with two adapters."""
    folder = tmp_path_factory.mktemp("same_bytes")
    paths = [tiny_llama_gguf(folder / f"{name}.gguf", TINY, name) for name in FORMATS]
    shapes = llama_linear_shapes(TINY)
    adapters = {
        "first": str(write_lora(folder / "first", shapes, rank=4)),
        "second": str(write_lora(folder / "second", dict(list(shapes.items())[::2]), seed=1, rank=20)),
    }
    return [
        native_model(str(path), TINY_SIZES, cache_memory=32 * 2**20, num_kept=8, lora_adapters=adapters)
        for path in paths
    ]


@pytest.fixture(scope="module")
def hybrid_models(tmp_path_factory) -> list[Model]:
    """Models with recurrent states, latent attention and experts; of each family a folder and a GGUF file."""
    folder = tmp_path_factory.mktemp("hybrids")
    paths = []
    for family, format_name in HYBRIDS.items():
        saved = folder / family
        random_model(f"{family} for llama.cpp").save_pretrained(saved)
        paths += [saved, gguf_of(saved, folder / f"{family}.gguf", format_name)]
    return [native_model(str(path), HYBRID_SIZES, cache_memory=64 * 2**20, num_kept=6) for path in paths]


def test_hybrid_schedules(hybrid_models):
    report = sweep(hybrid_models, range(NUM_HYBRID // CI_SHARE))
    assert report.num_cached_tokens > 0
    assert report.num_draft_tokens > 0


@pytest.mark.soak
def test_all_hybrid_schedules(hybrid_models):
    report = sweep(hybrid_models, range(NUM_HYBRID))
    assert report.num_preemptions > 10
    assert report.num_cached_tokens > 500


@pytest.fixture(scope="module")
def smollm2(smollm2_path) -> Model:
    return native_model(str(smollm2_path), SMOLLM2_SIZES, cache_memory=300 * 2**20, num_kept=3)


def sweep(models: list[Model], seeds: range) -> Report:
    """Every schedule; a failure names its seed, and `check_schedule(model, seed)` repeats it."""
    report = Report()
    for seed in seeds:
        print(f"schedule {seed}: {random_schedule(seed, models[seed % len(models)].sizes).kernels}")
        report.add(check_schedule(models[seed % len(models)], seed))
    print(
        f"{report.num_choices} choices, {report.num_cancelled} cancelled, "
        f"{report.num_preemptions} preemptions, "
        f"{report.num_cached_tokens} cached tokens, rows {sorted(report.row_counts)}"
    )
    return report


def test_tiny_schedules(tiny_models):
    report = sweep(tiny_models, range(NUM_TINY // CI_SHARE))
    assert report.num_preemptions > 0
    assert report.num_cached_tokens > 0
    assert report.num_cancelled > 0


@pytest.mark.soak
def test_all_tiny_schedules(tiny_models):
    """The sweep meets every kind of kernel, chunk and company that it is for."""
    report = sweep(tiny_models, range(NUM_TINY))
    assert report.num_preemptions > 100
    assert report.num_cached_tokens > 1000
    assert report.num_cancelled > 50
    assert report.chunk_sizes == {1, 7, 64, 512}
    assert {1, 2, 3, 4, 5, 8, 16, 33, 65} <= report.row_counts
    for names, field in (
        (_native.isa_names(), "isa"),
        (("bf16", "int8", "f32"), "kv_cache_dtype"),
        (("int12", "mixed", "int8", "bf16", "f32"), "activations"),
        ((1, 2), "num_threads"),
    ):
        assert {getattr(kernels, field) for kernels in report.kernels} == set(names)


def test_smollm2_schedules(smollm2):
    sweep([smollm2], range(NUM_SMOLLM2 // CI_SHARE))


@pytest.mark.soak
def test_all_smollm2_schedules(smollm2):
    sweep([smollm2], range(NUM_SMOLLM2))


class FaultyRunner:
    """A real runner whose logits [rows, vocab_size] pass through `fault(logits, num_tokens)`."""

    def __init__(self, runner: Runner, fault: Callable[[np.ndarray, int], np.ndarray]) -> None:
        self._runner, self._fault = runner, fault
        self.vocab_size, self.num_blocks, self.block_size = (
            runner.vocab_size,
            runner.num_blocks,
            runner.block_size,
        )
        self.copy_block = runner.copy_block
        self.copy_state, self.num_state_slots = runner.copy_state, runner.num_state_slots
        self.predict, self.last_hidden = runner.predict, runner.last_hidden
        self.hidden_states = runner.hidden_states

    def step(self, batch, rows) -> list[SampledToken]:
        return [sample(line, row) for line, row in zip(self.logits(batch), rows, strict=True)]

    def logits(self, batch) -> np.ndarray:
        logits = self._runner.logits(batch)
        return self._fault(logits, len(batch.token_ids)) if len(logits) else logits


class ForgetfulRunner(FaultyRunner):
    """Copies of blocks are not made."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner, no_fault)
        self.copy_block = lambda source, target: None


class SwitchingRunner(FaultyRunner):
    """Other kernels for large batches than for small ones: a sum whose order depends on the rows."""

    def __init__(self, small: Runner, large: Runner) -> None:
        super().__init__(small, no_fault)
        large._cache = small._cache
        self._large = large

    def logits(self, batch) -> np.ndarray:
        return (self._large if len(batch.token_ids) > 16 else self._runner).logits(batch)


def no_fault(logits: np.ndarray, num_tokens: int) -> np.ndarray:
    return logits


def scale_per_batch(logits: np.ndarray, num_tokens: int) -> np.ndarray:
    """Rounded with one scale for all rows."""
    scale = np.abs(logits).max() / np.float32(2**22)
    return np.round(logits / scale) * scale


def split_reduction(logits: np.ndarray, num_tokens: int) -> np.ndarray:
    """One unit in the last place off where more than one token is computed."""
    return np.nextafter(logits, np.float32(np.inf)) if num_tokens > 1 else logits


def row_after_row(logits: np.ndarray, num_tokens: int) -> np.ndarray:
    """One unit in the last place off in all rows but the first."""
    return np.concatenate((logits[:1], np.nextafter(logits[1:], np.float32(np.inf))))


def with_fault(model: Model, wrap: Callable[[Runner], Runner]) -> Model:
    def load(kernels: Kernels):
        runner, info = model.load(kernels)
        return wrap(runner), info

    return Model(load, model.sizes)


def check_few(model: Model) -> None:
    """Four schedules of few requests."""
    model = replace(model, sizes=replace(model.sizes, num_requests=(5,)))
    for seed in range(1000, 1004):
        check_schedule(model, seed)


def test_without_a_fault_the_harness_is_content(tiny_models):
    check_few(with_fault(tiny_models[0], lambda runner: FaultyRunner(runner, no_fault)))


@pytest.mark.parametrize("fault", [scale_per_batch, split_reduction, row_after_row])
def test_a_planted_fault_is_found(tiny_models, fault):
    model = with_fault(tiny_models[0], lambda runner: FaultyRunner(runner, fault))
    with pytest.raises(DifferentBytesError, match=r"schedule 100\d, .* differs from the request run alone"):
        check_few(model)


def test_blocks_that_are_not_copied_are_found(tiny_models):
    with pytest.raises(DifferentBytesError):
        check_few(with_fault(tiny_models[0], ForgetfulRunner))


def test_kernels_that_depend_on_the_rows_are_found(tiny_models):
    """The same weights on kernels that add in another order, for more than 16 tokens."""
    if len(_native.isa_names()) < 2:
        pytest.skip("this machine runs one set of kernels")
    best, *_, plainest = _native.isa_names()

    def load(kernels: Kernels):
        runners = [tiny_models[2].load.__wrapped__(Kernels(isa, "f32", "f32")) for isa in (best, plainest)]
        return SwitchingRunner(*(runner for runner, _ in runners)), runners[0][1]

    with pytest.raises(DifferentBytesError):
        check_few(Model(load, TINY_SIZES))


def test_a_schedule_is_a_function_of_its_seed():
    schedules = [random_schedule(seed, TINY_SIZES) for seed in range(50)]
    assert schedules == [random_schedule(seed, TINY_SIZES) for seed in range(50)]
    assert all(a != b for a, b in itertools.pairwise(schedules))
