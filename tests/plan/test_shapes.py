from __future__ import annotations

import json

import pytest

from jinn.models.presets import PRESETS, preset_config
from jinn.plan.shapes import ASSUMPTION, shape_of
from jinn.plan.tables import ScenarioError

# Keys and values of a token in bf16, recurrent states in float32, tails of convolutions in bf16, weights of a
# token in billions but the embedding's, attention's operations per token and position (expanded for MLA).
PUBLISHED = {
    "SmolLM2-135M": (23_040, 0, 0, 0.1345, 69_120),
    "SmolLM2-360M": (40_960, 0, 0, 0.3618, 122_880),
    "SmolLM2-1.7B": (196_608, 0, 0, 1.711, 196_608),
    "Qwen3-0.6B": (114_688, 0, 0, 0.596, 229_376),
    "Qwen3-1.7B": (114_688, 0, 0, 1.72, 229_376),
    "Qwen3-4B": (147_456, 0, 0, 4.02, 589_824),
    "Qwen3-8B": (147_456, 0, 0, 7.57, 589_824),
    "Qwen3-14B": (163_840, 0, 0, 13.99, 819_200),
    "Qwen3-32B": (262_144, 0, 0, 31.98, 2_097_152),
    "Qwen3-30B-A3B": (98_304, 0, 0, 3.04, 786_432),
    "Qwen3-235B-A22B": (192_512, 0, 0, 21.57, 3_080_192),
    "Qwen3-Next-80B-A3B": (24_576, 75_497_472, 1_769_472, 3.56, 196_608),
    "Qwen3.5-0.8B": (12_288, 18_874_368, 663_552, 0.75, 49_152),
    "Qwen3.5-2B": (12_288, 18_874_368, 663_552, 1.88, 49_152),
    "Qwen3.5-4B": (32_768, 50_331_648, 1_179_648, 4.21, 131_072),
    "Qwen3.5-9B": (32_768, 50_331_648, 1_179_648, 7.94, 131_072),
    "Qwen3.5-27B": (65_536, 150_994_944, 2_949_120, 25.62, 393_216),
    "Qwen3.5-35B-A3B": (20_480, 62_914_560, 1_474_560, 2.95, 163_840),
    "Qwen3.5-122B-A10B": (24_576, 150_994_944, 2_654_208, 9.01, 393_216),
    "Qwen3.5-397B-A17B": (30_720, 188_743_680, 3_317_760, 16.33, 491_520),
    "DeepSeek-V3": (70_272, 0, 0, 36.63, 4_997_120),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_sequence_keeps_and_a_token_costs(name):
    kv, state, conv, billions, per_position = PUBLISHED[name]
    shape = shape_of(name)
    layers = shape.work.layers
    assert shape.kv_bytes_per_token == kv
    assert sum(layer.count * 4 * layer.state_values for layer in layers) == state
    assert sum(layer.count * 2 * layer.conv_values for layer in layers) == conv
    assert shape.state_bytes_per_sequence == state + conv
    matrices = sum(layer.count * matrix.flops for layer in layers for matrix in layer.matrices)
    assert (matrices + shape.work.head.flops) / 2e9 == pytest.approx(billions, rel=5e-3)
    assert sum(layer.count * layer.expanded_flops for layer in layers) == per_position


def test_latent_attention_absorbed():
    layers = shape_of("DeepSeek-V3").work.layers
    assert sum(layer.count * layer.attention_flops for layer in layers) == 16_990_208


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("Qwen3-8B", "dense"),
        ("Qwen3-30B-A3B", "moe"),
        ("Qwen3-Next-80B-A3B", "hybrid"),
        ("DeepSeek-V3", "mla"),
    ],
)
def test_architecture(name, architecture):
    assert shape_of(name).architecture == architecture


def test_delta_rule_flops():
    work = shape_of("Qwen3-Next-80B-A3B").work
    flops = sum(layer.count * layer.state_flops for layer in work.layers)
    assert flops == 7 * 36 * 32 * 128 * 128  # 0.13 GFLOP per token


def test_precisions():
    shapes = {precision: shape_of("Qwen3-8B", precision) for precision in ("bf16", "fp8", "int4")}
    assert shapes["bf16"].work.weight_bytes == pytest.approx(2 * 8_190_735_360)
    vocabulary = 2 * 151936 * 4096
    rest = 8_190_735_360 - vocabulary
    assert shapes["fp8"].work.weight_bytes == pytest.approx(2 * vocabulary + rest, rel=1e-3)
    assert shapes["int4"].work.weight_bytes == pytest.approx(2 * vocabulary + rest * 4.5 / 8, rel=1e-3)


def test_assumed_shape_says_so():
    shape = shape_of("MoE-1T-A32B")
    assert shape.note == ASSUMPTION
    assert shape.work.total_parameters == pytest.approx(1e12, rel=0.05)
    assert shape.work.active_parameters == pytest.approx(32e9, rel=0.05)


def test_config_files(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(preset_config("Qwen3-0.6B")))
    assert shape_of(str(path)).work == shape_of("Qwen3-0.6B").work
    assert shape_of(str(tmp_path)).work == shape_of("qwen3-0.6b").work


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
        ({"model_type": "llama"}, "is missing"),
        ([], "holds no JSON object"),
    ],
)
def test_bad_configs(tmp_path, config, error):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ScenarioError, match=error):
        shape_of(str(path))


def test_unknown_name():
    with pytest.raises(ScenarioError, match="is no file and no shape that jinn knows: SmolLM2-135M"):
        shape_of("GPT-9")


def test_gguf(smollm2_path):
    shape = shape_of(str(smollm2_path))
    assert shape.work.total_parameters == 134_515_008


def test_every_preset_has_work():
    for name in PRESETS:
        work = shape_of(name).work
        assert work.num_layers == preset_config(name)["num_hidden_layers"]
        assert work.active_parameters <= work.total_parameters
