"""Multi-token prediction against transformers' own module, made of each family's layer and norm."""

from __future__ import annotations

import importlib
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpLayer

from jinn.engine.loading import load_runner
from jinn.engine.reference_runner import ReferenceRunner, load_reference_runner
from jinn.models.registry import model_of
from jinn.ops.protocol import Batch
from jinn.ops.reference import PagedCache, ReferenceOps
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError

from .gguf_models import gguf_of
from .test_families import LIMIT, load, load_parameters
from .transformers_models import BLOCK_SIZE, all_logits, random_ids, random_model, randomize, state_slots

QWEN_NAMES = {
    "enorm": "mtp.pre_fc_norm_embedding",
    "hnorm": "mtp.pre_fc_norm_hidden",
    "eh_proj": "mtp.fc",
    "post_norm": "mtp.norm",
    "mtp_block": "mtp.layers.0",
}
VARIANTS = {
    "qwen3_next untied": ("qwen3_next", "Qwen3Next", QWEN_NAMES),
    "qwen3_5 tied": ("qwen3_5", "Qwen3_5", QWEN_NAMES),
    "qwen3_5_moe untied": ("qwen3_5_moe", "Qwen3_5Moe", QWEN_NAMES),
    "deepseek_v3 untied": (
        "deepseek_v3",
        "DeepseekV3",
        {
            "enorm": "model.layers.4.enorm",
            "hnorm": "model.layers.4.hnorm",
            "eh_proj": "model.layers.4.eh_proj",
            "post_norm": "model.layers.4.shared_head.norm",
            "mtp_block": "model.layers.4",
        },
    ),
}
IDS = random_ids(40)
TOLERANCES = pytest.mark.parametrize(
    ("loader", "tolerance"), [(load_reference_runner, 5e-5), (load_runner, 1e-4)], ids=["reference", "native"]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a variant to a folder with a prediction module, and the module's hidden states."""
    folder = tmp_path_factory.mktemp("prediction")

    @cache
    def save(variant):
        path = folder / variant.replace(" ", "_")
        random_model(variant).save_pretrained(path)
        module = prediction_module(variant, path)
        add_tensors(path, prediction_tensors(variant, module))
        return path, expected_hidden(path, module)

    return save


def prediction_module(variant, path):
    package, prefix, _ = VARIANTS[variant]
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    config = AutoModelForCausalLM.from_pretrained(path).config
    config._attn_implementation = "eager"
    if "layer_types" in config.to_dict():
        config.layer_types = ["full_attention"]
    layer = getattr(modeling, f"{prefix}DecoderLayer")
    index = 0 if "layer_types" in config.to_dict() else config.num_hidden_layers
    module = MtpLayer(config, layer, getattr(modeling, f"{prefix}RMSNorm"), index).float().eval()
    randomize(module, is_offset=package != "deepseek_v3")
    return module


def prediction_tensors(variant, module):
    """By the names that checkpoints have; experts are a tensor each."""
    names, tensors = VARIANTS[variant][2], {}
    for name, values in (*module.named_parameters(), *module.named_buffers()):
        part, _, rest = name.partition(".")
        name = f"{names[part]}.{rest}"
        if "experts.gate_up_proj" in name:
            for expert, both in enumerate(values):
                gate, up = both.chunk(2)
                base = name.removesuffix("gate_up_proj")
                tensors[f"{base}{expert}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{base}{expert}.up_proj.weight"] = up.contiguous()
        elif "experts.down_proj" in name and "shared" not in name:
            base = name.removesuffix("down_proj")
            tensors |= {
                f"{base}{expert}.down_proj.weight": down.clone() for expert, down in enumerate(values)
            }
        else:
            tensors[name] = values.detach().clone()
    if "deepseek" in variant:  # copies that its checkpoints have
        tensors["model.layers.4.embed_tokens.weight"] = torch.zeros(96, 64)
        tensors["model.layers.4.shared_head.head.weight"] = torch.zeros(96, 64)
    return {name: values.detach() for name, values in tensors.items()}


def add_tensors(path, tensors):
    weights = path / "model.safetensors"
    save_file({**load_file(weights), **tensors}, weights, metadata={"format": "pt"})


def expected_hidden(path, module):
    """Of all positions but the first: each reads its own token, and the hidden states before it."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([IDS])
    mask = torch.full((39, 39), float("-inf")).triu(1)[None, None]
    positions = torch.arange(1, 40)[None]
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        rotation = model.model.rotary_emb(hidden[:, 1:], positions)
        embedded = model.get_input_embeddings()(ids[:, 1:])
        return module(embedded, hidden[:, :-1], rotation, mask, positions, None)[0].numpy()


def predict(runner, hidden, start=0, end=39):
    """The module's hidden states of pairs `start` to `end`; a pair's position is that of its hidden state."""
    count = end - start
    runner.predict(
        Batch(
            np.array(IDS[start + 1 : end + 1], np.int32),
            np.arange(start, end, dtype=np.int32),
            np.array([0, count], np.int32),
            np.array([end], np.int32),
            np.arange(-(-end // BLOCK_SIZE), dtype=np.int32)[None],
            np.empty(0, np.int32),
            **state_slots(1),
            hidden=hidden[start:end],
        ),
        [],
    )
    return runner.last_hidden()


def main_hidden(runner):
    runner.step(ids_batch(), [])
    return runner.last_hidden()


def ids_batch():
    return Batch(
        np.array(IDS, np.int32),
        np.arange(40, dtype=np.int32),
        np.array([0, 40], np.int32),
        np.array([40], np.int32),
        np.arange(-(-40 // BLOCK_SIZE), dtype=np.int32)[None],
        np.empty(0, np.int32),
        **state_slots(1),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@TOLERANCES
def test_hidden_states(saved, variant, loader, tolerance):
    """Whole, and in parts with the module's own keys and values between them."""
    path, expected = saved(variant)
    runner = load(loader, path, speculative="mtp")
    hidden = main_hidden(runner)
    whole = predict(runner, hidden)
    assert np.abs(whole - expected).max() <= tolerance
    parts = [predict(runner, hidden, *part) for part in ((0, 1), (1, 20), (20, 39))]
    assert np.abs(np.concatenate(parts) - expected).max() <= tolerance
    if loader is load_runner:
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_without_its_module_is_the_same(saved, variant):
    path, _ = saved(variant)
    with open_checkpoint(path) as checkpoint:
        model = model_of(checkpoint)
    assert model.has_mtp
    assert len(model.kv_specs()) == len(model.without_prediction().kv_specs()) + 1
    assert model.active_parameters() == model.without_prediction().active_parameters()
    assert model.flops(7, 9) == model.without_prediction().flops(7, 9)
    logits = [all_logits(load(load_runner, path, speculative=kind), IDS) for kind in ("off", "mtp")]
    assert np.array_equal(*logits)


@pytest.mark.parametrize("variant", ["qwen3_5 tied", "qwen3_5_moe untied"])
@TOLERANCES
def test_gguf_has_the_module_as_its_last_block(saved, tmp_path, variant, loader, tolerance):
    path, expected = saved(variant)
    runner = load(loader, gguf_of(path, tmp_path / "model.gguf"), speculative="mtp")
    assert np.abs(predict(runner, main_hidden(runner)) - expected).max() <= tolerance


class HiddenFirst(ReferenceOps):
    """The inputs of the projection the other way round."""

    def join_heads(self, values, num_heads):
        return super().join_heads(values[::-1] if num_heads == 1 else values, num_heads)


def ones(name):
    return lambda parameters: {**parameters, name: torch.ones_like(parameters[name])}


def swapped(parameters):
    norms = "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"
    return {**parameters, norms[0]: parameters[norms[1]], norms[1]: parameters[norms[0]]}


PARAMETER_FAULTS = {
    "norms swapped": swapped,
    "embedding norm": ones("mtp.pre_fc_norm_embedding.weight"),
    "hidden norm": ones("mtp.pre_fc_norm_hidden.weight"),
    "final norm": ones("mtp.norm.weight"),
    "main model's final norm": lambda parameters: {
        **parameters,
        "mtp.norm.weight": parameters["model.norm.weight"],
    },
}


def module_error(path, expected, ops, change=lambda parameters: parameters):
    model, parameters = load_parameters(path)
    cache = PagedCache(model.kv_specs(), "f32", 16, BLOCK_SIZE)
    hidden = main_hidden(ReferenceRunner(model, parameters, ReferenceOps(), cache))
    runner = ReferenceRunner(model, change(parameters), ops, cache)
    return np.abs(predict(runner, hidden) - expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_faults_are_found(saved, variant):
    path, expected = saved(variant)
    assert module_error(path, expected, ReferenceOps()) <= LIMIT / 4
    if "deepseek" not in variant:  # its attention joins too
        assert module_error(path, expected, HiddenFirst()) > LIMIT
    for fault, change in PARAMETER_FAULTS.items():
        assert module_error(path, expected, ReferenceOps(), change) > LIMIT, fault


def test_hidden_states_of_another_position_are_found(saved):
    path, expected = saved("qwen3_next untied")
    runner = load(load_reference_runner, path, speculative="mtp")
    assert np.abs(predict(runner, np.roll(main_hidden(runner), 1, axis=0)) - expected).max() > LIMIT


def test_a_tensor_past_the_last_block_is_refused_without_a_module(saved, tmp_path):
    path, _ = saved("deepseek_v3 untied")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    tensors = load_file(path / "model.safetensors")
    tensors = {name: values for name, values in tensors.items() if ".layers.4." not in name}
    save_file({**tensors, "model.layers.4.enorm.weight": torch.zeros(64)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.layers\.4\.enorm\.weight"):
        load(load_runner, tmp_path)
