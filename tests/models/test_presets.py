"""The published shapes: their parameters are counted by jinn and by transformers."""

from __future__ import annotations

from math import prod

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jinn.models.fields import ConfigError
from jinn.models.presets import PRESETS, preset, preset_config
from jinn.models.registry import FAMILIES

TOTAL = {
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-4B-2507": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-30B-A3B-2507": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-235B-A22B-2507": 235_093_634_560,
    "Qwen3-Next-80B-A3B": 79_674_391_296,
    "Qwen3.5-0.8B": 752_393_024,
    "Qwen3.5-2B": 1_881_825_088,
    "Qwen3.5-4B": 4_205_751_296,
    "Qwen3.5-9B": 8_953_803_264,
    "Qwen3.5-27B": 26_895_998_464,
    "Qwen3.5-35B-A3B": 34_660_610_688,
    "Qwen3.5-122B-A10B": 122_111_526_912,
    "Qwen3.5-397B-A17B": 396_346_350_336,
    "DeepSeek-V3": 671_026_404_352,
}
ACTIVE_BILLIONS = {
    "Qwen3-30B-A3B": "3.353",
    "Qwen3-30B-A3B-2507": "3.353",
    "Qwen3-235B-A22B": "22.19",
    "Qwen3-235B-A22B-2507": "22.19",
    "Qwen3-Next-80B-A3B": "3.875",
    "Qwen3.5-35B-A3B": "3.455",
    "Qwen3.5-122B-A10B": "9.771",
    "Qwen3.5-397B-A17B": "17.349",
    "DeepSeek-V3": "37.55",
}
SUPPORTED = [name for name, config in PRESETS.items() if config["model_type"] in FAMILIES]


def test_every_shape_is_counted():
    assert set(TOTAL) == set(PRESETS)


@pytest.mark.parametrize("name", SUPPORTED)
def test_parameters(name):
    model = preset(name)
    specs = model.parameters().items()
    # the bias for choosing experts is no parameter in transformers
    counted = [spec for name, spec in specs if not name.endswith("e_score_correction_bias")]
    assert sum(prod(spec.shape) for spec in counted) == TOTAL[name]
    if name not in ACTIVE_BILLIONS:
        assert model.active_parameters() == TOTAL[name]
        return
    decimals = len(ACTIVE_BILLIONS[name].partition(".")[2])
    assert f"{model.active_parameters() / 1e9:.{decimals}f}" == ACTIVE_BILLIONS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_counts_the_same(name):
    config = preset_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert sum(parameter.numel() for parameter in model.parameters()) == TOTAL[name]
    assert [type(model).__name__] == config["architectures"]


def test_names_take_any_case_and_layers_can_be_fewer():
    model = preset("qwen3-0.6b", 2)
    assert preset_config("QWEN3-0.6B", 2)["num_hidden_layers"] == 2
    assert sum("input_layernorm" in name for name in model.parameters()) == 2


@pytest.mark.parametrize("layers", [0, 29])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ConfigError, match=f"1 to 28 layers, not {layers}"):
        preset_config("Qwen3-0.6B", layers)


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"'qwen3-7b' is not known; there are SmolLM2-135M, .*DeepSeek-V3"):
        preset("qwen3-7b")
