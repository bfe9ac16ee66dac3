from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from jinn.models.costs import costs
from jinn.models.presets import preset
from jinn.models.registry import model_of
from jinn.weights.checkpoint import open_checkpoint
from tiny import TinyLlama, tiny_llama_gguf

CONFIG = TinyLlama()
HIDDEN, INNER, VOCAB, LAYERS = 64, 96, CONFIG.vocab_size, 2
LAYER_WEIGHTS = LAYERS * (HIDDEN * (64 + 32 + 32) + 64 * HIDDEN + 3 * HIDDEN * INNER)
NORM_BYTES = 4 * HIDDEN * (2 * LAYERS + 1)


def tiny_costs(path, format_name, **config):
    path = tiny_llama_gguf(path / "tiny.gguf", TinyLlama(**config), format_name)
    with open_checkpoint(path) as checkpoint:
        return costs(model_of(checkpoint), checkpoint)


@pytest.mark.parametrize(
    ("format_name", "arithmetic", "bytes_of_32"),
    [("F32", "f32", 128), ("BF16", "bf16", 64), ("Q4_1", "int8", 20)],
)
def test_weights_and_operations(tmp_path, format_name, arithmetic, bytes_of_32):
    found = tiny_costs(tmp_path, format_name)
    assert found.weight_bytes == (LAYER_WEIGHTS + VOCAB * HIDDEN) * bytes_of_32 // 32 + NORM_BYTES
    assert found.layer_operations == {arithmetic: 2 * LAYER_WEIGHTS}
    assert found.head_operations == {arithmetic: 2 * VOCAB * HIDDEN}


def test_an_embedding_beside_a_head_is_not_read(tmp_path):
    tied = tiny_costs(tmp_path, "F32")
    untied = tiny_costs(tmp_path, "F32", tie_word_embeddings=False)
    assert untied.weight_bytes == tied.weight_bytes
    assert untied.head_operations == tied.head_operations


def test_operations_count_the_head_per_row_and_attention_per_position(tmp_path):
    found = tiny_costs(tmp_path, "Q8_0")
    attention = 4 * LAYERS * 64 * (3 + 4 + 5)  # a query's score and value, 64 wide, at each position it sees
    assert found.operations(3, 5, 1) == {
        "f32": attention,
        "int8": 2 * (3 * LAYER_WEIGHTS + VOCAB * HIDDEN),
    }


@pytest.mark.parametrize(
    ("name", "gigaflops", "per_position"),
    [
        ("Qwen3-0.6B", 1.19, 229_376),
        ("Qwen3-30B-A3B", 6.08, 786_432),
        ("Qwen3-Next-80B-A3B", 7.13 + 0.13, 196_608),
        ("Qwen3.5-9B", 15.87 + 0.09, 131_072),
        ("DeepSeek-V3", 73.25, 16_990_208),
    ],
)
def test_operations_of_published_shapes(name, gigaflops, per_position):
    """2 per weight that a token reads and 7 per number of its states; latents are attended to absorbed."""
    model = preset(name)
    assert model.flops(1, 1001) - model.flops(1, 1) == 1000 * per_position
    assert (model.flops(1, 1) - per_position) / 1e9 == pytest.approx(gigaflops, abs=0.01)


def test_a_prediction_module_costs_nothing_until_it_is_used():
    model = preset("Qwen3-Next-80B-A3B")
    with_module = replace(model, has_mtp=True)
    sizes = [sum(prod(spec.shape) for spec in m.parameters().values()) for m in (model, with_module)]
    assert round((sizes[1] - sizes[0]) / 1e9, 2) == 1.65
    assert with_module.flops(5, 9) == model.flops(5, 9)
