"""The ways in which files keep the same model: each gives the same parameters, and can be written back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jinn.engine.loading import load_parameters, load_runner
from jinn.engine.reference_runner import load_tensors
from jinn.models.parameters import NewFile
from jinn.models.registry import model_of
from jinn.models.sources import parameter_sources
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError
from native.programs import POOLS

from .gguf_models import NOT_IN_GGUF, gguf_of
from .test_families import load
from .test_families import load_parameters as load_reference
from .transformers_models import VARIANTS, all_logits, random_ids, random_model

MIXTURES = ("qwen3_moe untied", "qwen3_next untied", "qwen3_5_moe untied", "deepseek_v3 untied")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")

    @cache
    def save(variant):
        random_model(variant).save_pretrained(folder / variant)
        return folder / variant

    return save


def parameters_of(path):
    with open_checkpoint(path) as checkpoint:
        return load_tensors(model_of(checkpoint), checkpoint, lambda loaded, total: None)


def check_same(path, other):
    expected, found = parameters_of(path), parameters_of(other)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert torch.equal(values, found[name]), name


def rewritten(source, target, change_config=lambda config: config, change_tensors=lambda tensors: tensors):
    """A folder with the config and the tensors of another, changed."""
    target.mkdir()
    config = change_config(json.loads((source / "config.json").read_text()))
    (target / "config.json").write_text(json.dumps(config))
    save_file(change_tensors(load_file(source / "model.safetensors")), target / "model.safetensors")
    return target


def stacked(tensors):
    """All experts in one tensor, gate above up, as in checkpoints of Qwen3.5."""
    whole = {name: values for name, values in tensors.items() if ".experts." not in name}
    for prefix in {name.split(".experts.")[0] for name in tensors if ".experts." in name}:
        parts = {
            part: torch.stack([tensors[f"{prefix}.experts.{e}.{part}_proj.weight"] for e in range(8)])
            for part in ("gate", "up", "down")
        }
        whole[f"{prefix}.experts.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), 1)
        whole[f"{prefix}.experts.down_proj"] = parts["down"]
    return whole


def with_images(tensors):
    """As in checkpoints with a vision tower: another prefix, and tensors that are left out."""
    renamed = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}
    return {**renamed, "model.visual.blocks.0.attn.qkv.weight": torch.zeros(3, 4)}


def nested(config):
    kind = config.pop("model_type")
    config.pop("tie_word_embeddings")
    return {
        "model_type": kind.removesuffix("_text"),
        "tie_word_embeddings": kind == "qwen3_5_text",
        "vision_config": {"hidden_size": 3, "depth": 2},
        "text_config": {**config, "model_type": kind},
    }


def config_of_before(config):
    """Rotation at the top level, and the number of experts under the old name."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    if "layer_types" in config:
        del config["layer_types"]
        config["full_attention_interval"] = 4
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return config


@pytest.mark.parametrize("variant", MIXTURES)
def test_stacked_experts(saved, tmp_path, variant):
    check_same(saved(variant), rewritten(saved(variant), tmp_path / "stacked", change_tensors=stacked))


@pytest.mark.parametrize("variant", ["qwen3_5 tied", "qwen3_5_moe untied"])
def test_a_model_with_a_vision_tower(saved, tmp_path, variant):
    check_same(saved(variant), rewritten(saved(variant), tmp_path / "images", nested, with_images))


def test_a_stacked_mixture_with_a_vision_tower(saved, tmp_path):
    source = saved("qwen3_5_moe untied")
    changed = rewritten(source, tmp_path / "images", nested, lambda tensors: with_images(stacked(tensors)))
    logits = [all_logits(load(load_runner, path), random_ids(65)) for path in (source, changed)]
    assert np.array_equal(*logits)


@pytest.mark.parametrize(
    "variant", ["llama theta", "qwen3 own yarn", *MIXTURES, "qwen3_5 tied", "deepseek_v3 plain"]
)
def test_configs_of_before(saved, tmp_path, variant):
    changed = rewritten(saved(variant), tmp_path / "before", config_of_before)
    with open_checkpoint(saved(variant)) as one, open_checkpoint(changed) as other:
        assert model_of(one) == model_of(other)


@pytest.mark.parametrize("variant", ["qwen3_next untied", "qwen3_next for llama.cpp", "deepseek_v3 untied"])
def test_gguf_files_of_before(saved, tmp_path, variant):
    """With the DeltaNet's projections fused as in the checkpoint, or k and v of the latents together."""
    paths = [gguf_of(saved(variant), tmp_path / f"{is_old}.gguf", is_old=is_old) for is_old in (False, True)]
    check_same(*paths)


def test_blocks_of_a_gguf_file_of_before_are_taken_apart(saved, tmp_path):
    """k of the latents changes rows for columns, so it is held in float32."""
    source = saved("deepseek_v3 for llama.cpp")
    path = gguf_of(source, tmp_path / "before.gguf", "Q8_0", is_old=True)
    with open_checkpoint(path) as checkpoint:
        packed = load_parameters(
            parameter_sources(model_of(checkpoint), checkpoint), POOLS[1], lambda loaded, total: None
        )
    name = "model.layers.0.self_attn.k_b_proj.weight"
    reference = parameters_of(path)[name]
    assert packed[name].format == reference.format == "F32"
    assert packed[name.replace("k_b", "v_b")].format == "Q8_0"
    assert np.array_equal(packed[name].dequantize(), reference.numpy())


@pytest.mark.parametrize("variant", MIXTURES)
def test_gguf_with_gate_and_up_in_one_tensor(saved, tmp_path, variant):
    paths = [gguf_of(saved(variant), tmp_path / f"{n}.gguf", has_gate_up=n == 1) for n in (0, 1)]
    check_same(*paths)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_origins_are_inverse(saved, variant, kind):
    """A new file is filled by its parameters, and gives them back."""
    if kind == "gguf" and variant in NOT_IN_GGUF:
        return
    model, parameters = load_reference(saved(variant))
    specs, origins = model.parameters(), model.origins(NewFile(kind))
    file = {}
    for name, spec in specs.items():
        for tensor in origins[name].names:
            file.setdefault(tensor, np.full(origins[name].shape_of(spec), np.nan, np.float32))
        tensors = [file[tensor] for tensor in origins[name].names]
        origins[name].write(parameters[name].numpy(), tensors, spec)
    assert not any(np.isnan(values).any() for values in file.values())
    for name, spec in specs.items():
        found = origins[name].read([file[tensor] for tensor in origins[name].names], spec)
        tolerance = 0 if origins[name].encoding is None else 1e-6
        np.testing.assert_allclose(found, parameters[name].numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in NOT_IN_GGUF])
def test_new_files_are_laid_out_as_others_do(saved, tmp_path, variant):
    """Names, shapes and values of a Hugging Face folder and of GGUF, written by jinn's origins."""
    model, parameters = load_reference(saved(variant))
    for kind, path in (("hf", saved(variant)), ("gguf", gguf_of(saved(variant), tmp_path / "model.gguf"))):
        with open_checkpoint(path) as checkpoint:
            for name, spec in model.parameters().items():
                origin = model.origins(NewFile(kind))[name]
                tensors = [
                    np.array(checkpoint.data(tensor)).view(np.float32).reshape(origin.shape_of(spec))
                    for tensor in origin.names
                ]
                found = origin.read(tensors, spec)
                np.testing.assert_allclose(found, parameters[name].numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_decay_that_no_parameter_has_is_refused(saved, tmp_path, value):
    """GGUF keeps the negative of an exponential."""
    path = gguf_of(saved("qwen3_next untied"), tmp_path / "model.gguf")
    with open_checkpoint(path) as checkpoint:
        offset = checkpoint.tensors["blk.0.ssm_a"].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 4] = np.float32(value).tobytes()
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"blk\.0\.ssm_a"):
        load(load_runner, path)


@pytest.mark.parametrize("multiplier", [None, 0.0, 0.1])
def test_yarn_of_latents_in_gguf_counts_in_the_softmax_scale_alone(saved, tmp_path, multiplier):
    """As in llama.cpp: by its square where the file has a multiplier, not at all where it has none."""
    path = gguf_of(saved("deepseek_v3 untied"), tmp_path / "model.gguf")
    with open_checkpoint(path) as checkpoint:
        key = "deepseek2.rope.scaling.yarn_log_multiplier"
        metadata = {name: value for name, value in checkpoint.config_source.items() if name != key}
        if multiplier is not None:
            metadata[key] = multiplier
        model = model_of(replace(checkpoint, config_source=metadata))
    factor = 0.1 * math.log(40) + 1 if multiplier else 1.0
    assert model.rope.attention_factor == 1
    assert model.softmax_scale == pytest.approx(12**-0.5 * factor**2)


def test_a_stacked_mixture_with_a_prediction_module(saved, tmp_path):
    """Of DeepSeek-V3, whose module's experts lie in the layer after the last."""
    model, _ = load_reference(saved("deepseek_v3 untied"))
    names = {"model.layers.4.eh_proj.weight", "model.layers.4.mlp.experts.gate_up_proj"}
    origins = replace(model, has_mtp=True).origins(NewFile("hf", names))
    up = origins["mtp.layers.0.mlp.experts.up_proj.weight"]
    assert up.name == "model.layers.4.mlp.experts.gate_up_proj"
    assert up.rows.tolist() == list(range(24, 48))
    assert (
        origins["mtp.layers.0.self_attn.k_b_proj.weight"].name == "model.layers.4.self_attn.kv_b_proj.weight"
    )
