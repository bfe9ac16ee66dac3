from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jinn.weights.errors import WeightsError
from jinn.weights.lora import read_lora
from lora_folders import ALPHA, RANK, lora_config, lora_tensors, save_lora, write_lora

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
SHAPES = {Q: (12, 8), UP: (20, 8)}


def test_the_scale_is_within_b(tmp_path):
    tensors = lora_tensors(SHAPES)
    adapter = read_lora(write_lora(tmp_path / "a", SHAPES))
    assert sorted(adapter.linears) == sorted(SHAPES)
    for module, linear in adapter.linears.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{name}.weight"] for name in "AB")
        np.testing.assert_array_equal(linear.a, a)
        np.testing.assert_array_equal(linear.b, b * np.float32(ALPHA / RANK))
    assert adapter.nbytes == 4 * RANK * (12 + 8 + 20 + 8)


def test_rank_stabilized_adapters_divide_by_the_root(tmp_path):
    plain = read_lora(write_lora(tmp_path / "plain", SHAPES, lora_alpha=RANK))
    stable = read_lora(write_lora(tmp_path / "stable", SHAPES, lora_alpha=RANK, use_rslora=True))
    np.testing.assert_array_equal(stable.linears[Q].b, plain.linears[Q].b * np.float32(RANK**0.5))


@pytest.mark.parametrize("pattern", ["up_proj", "mlp.up_proj", f"^{UP}", r"layers\.1\.mlp\.up_proj$", UP])
def test_ranks_and_alphas_of_single_modules(tmp_path, pattern):
    tensors = {**lora_tensors({Q: SHAPES[Q]}), **lora_tensors({UP: SHAPES[UP]}, rank=2)}
    config = lora_config(list(SHAPES), rank_pattern={pattern: 2}, alpha_pattern={pattern: 5.0})
    adapter = read_lora(save_lora(tmp_path / "a", config, tensors))
    assert [len(adapter.linears[name].a) for name in (Q, UP)] == [RANK, 2]
    np.testing.assert_array_equal(
        adapter.linears[UP].b, tensors[f"base_model.model.{UP}.lora_B.weight"] * np.float32(2.5)
    )


@pytest.mark.parametrize(
    "pattern", ["proj", "p_proj", "^up_proj", "^mlp.up_proj", "model.layers.0.mlp.up_proj"]
)
def test_patterns_of_other_modules(tmp_path, pattern):
    config = lora_config(list(SHAPES), rank_pattern={pattern: 2})
    assert len(read_lora(save_lora(tmp_path / "a", config, lora_tensors(SHAPES))).linears[UP].a) == RANK


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    tensors = {name: torch.from_numpy(values).to(dtype) for name, values in lora_tensors(SHAPES).items()}
    folder = write_lora(tmp_path / "a", SHAPES)
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = read_lora(folder)
    a = tensors[f"base_model.model.{Q}.lora_A.weight"].float().numpy()
    np.testing.assert_array_equal(adapter.linears[Q].a, a)
    assert adapter.linears[Q].a.dtype == adapter.linears[Q].b.dtype == np.float32


def test_the_digest_names_the_numbers(tmp_path):
    first, again = (read_lora(write_lora(tmp_path / name, SHAPES)) for name in "ab")
    scaled = read_lora(write_lora(tmp_path / "c", SHAPES, lora_alpha=ALPHA + 1))
    other = read_lora(write_lora(tmp_path / "d", SHAPES, seed=1))
    assert first.digest == again.digest
    assert len({first.digest, scaled.digest, other.digest}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', not 'LOHA'"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"use_dora": True}, "'use_dora' True is not supported"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' .* is not supported"),
        ({"lora_bias": True}, "'lora_bias' True is not supported"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out' True is not supported"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "'target_parameters' .* is not supported"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices' .* is not supported"),
        ({"layer_replication": [[0, 4]]}, "'layer_replication' .* is not supported"),
        ({"of_the_future": 1}, "'of_the_future' 1 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported, since it changes"),
        ({"r": 0}, "r must be an integer from 1 to 8192, not 0"),
        ({"r": True}, "r must be an integer"),
        ({"r": None}, "r must be an integer"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, not '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, not nan"),
        ({"use_rslora": 1}, "use_rslora must be true or false, not 1"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern must be an integer"),
        ({"rank_pattern": {r".*\.[qk]_proj": 2}}, "rank_pattern has .* only names of modules are supported"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must be a number, not None"),
        ({"target_modules": [1]}, "target_modules must be names of modules"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be numbers of layers"),
    ],
)
def test_configs_that_are_refused(tmp_path, changes, message):
    folder = save_lora(tmp_path / "a", lora_config(list(SHAPES), **changes), lora_tensors(SHAPES))
    with pytest.raises(WeightsError, match=rf"^{re.escape(str(folder))}/adapter_config.json: {message}"):
        read_lora(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["q_proj"]}, f"module '{UP}' is none of target_modules"),
        ({"layers_to_transform": [0]}, f"module '{UP}' is of none of layers_to_transform"),
        ({"layers_to_transform": [0, 1, 7]}, "layers_to_transform has 7, but the tensors do not"),
        ({"r": 5}, "which do not have the config's rank 5"),
        ({"rank_pattern": {"up_proj": 3}}, "which do not have the config's rank 3"),
        ({"lora_alpha": 1e29, "r": RANK}, "lora_B times its scale is not finite"),
    ],
)
def test_tensors_that_the_config_does_not_tell_of(tmp_path, changes, message):
    tensors = {name: values * np.float32(1e12) for name, values in lora_tensors(SHAPES).items()}
    folder = save_lora(tmp_path / "a", lora_config(list(SHAPES), **changes), tensors)
    with pytest.raises(
        WeightsError, match=rf"^{re.escape(str(folder))}/adapter_model.safetensors: .*{message}"
    ):
        read_lora(folder)


@pytest.mark.parametrize("layers", [[0, 1], None, []])
def test_all_layers_that_are_to_be_transformed(tmp_path, layers):
    assert (
        read_lora(write_lora(tmp_path / "a", SHAPES, layers_to_transform=layers)).linears.keys()
        == SHAPES.keys()
    )


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (f"{Q}.lora_magnitude_vector", np.ones(12, np.float32), "DoRA is not"),
        (
            "model.embed_tokens.lora_embedding_A",
            np.ones((4, 9), np.float32),
            "adapters of embeddings are not",
        ),
        (
            "lm_head.weight",
            np.ones((4, 9), np.float32),
            "only lora_A.weight and lora_B.weight of linears are",
        ),
        (f"{Q}.lora_A.bias", np.ones(4, np.float32), "only lora_A.weight and lora_B.weight"),
        (f"{UP}x.lora_A.weight", np.ones((4, 8), np.float32), "lora_B.weight' is missing"),
        (f"{UP}x.lora_B.weight", np.ones((8, 4), np.float32), "lora_A.weight' is missing"),
        (f"{Q}.lora_A.weight", np.ones((4, 8, 1), np.float32), r"is F32 \[4, 8, 1\], not a matrix"),
        (f"{Q}.lora_A.weight", np.full((4, 8), np.nan, np.float32), "element 0 is NaN or infinite"),
        (f"{Q}.lora_A.weight", np.ones((3, 8), np.float32), "do not have the config's rank 4"),
        (f"{Q}.lora_B.weight", np.ones((12, 5), np.float32), "do not have the config's rank 4"),
    ],
)
def test_tensors_that_are_refused(tmp_path, name, values, message):
    tensors = {**lora_tensors(SHAPES), f"base_model.model.{name}": values}
    folder = save_lora(tmp_path / "a", lora_config(list(SHAPES)), tensors)
    with pytest.raises(WeightsError, match=message):
        read_lora(folder)


def test_tensors_of_other_names_are_refused(tmp_path):
    folder = save_lora(tmp_path / "a", lora_config([Q]), {f"{Q}.lora_A.weight": np.ones((4, 8), np.float32)})
    with pytest.raises(WeightsError, match=f"tensor '{Q}.lora_A.weight' is not supported"):
        read_lora(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_missing_or_cut(tmp_path, name):
    folder = write_lora(tmp_path / "a", SHAPES)
    whole = (folder / name).read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        (folder / name).write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=name):
            read_lora(folder)
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=rf"{name}: cannot be"):
        read_lora(folder)
