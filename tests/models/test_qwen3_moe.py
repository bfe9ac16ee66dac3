"""What a mixture of experts adds: costs, batches, refusals, and faults that a comparison must find."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jinn.engine.loading import load_runner
from jinn.engine.reference_runner import load_reference_runner
from jinn.models.costs import costs
from jinn.models.fields import ConfigError
from jinn.models.registry import model_of
from jinn.ops.protocol import Routing
from jinn.ops.reference import ReferenceOps
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError
from native.programs import packed_sequences

from .test_families import LIMIT, REFERENCE_TOLERANCE, all_logits, load, load_parameters, reference_error
from .transformers_models import random_ids, random_model, transformers_logits

LOADERS = pytest.mark.parametrize("loader", [load_reference_runner, load_runner])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")

    @cache
    def save(variant="qwen3_moe untied"):
        random_model(variant).save_pretrained(folder / variant)
        return folder / variant

    return save


@cache
def expected_logits(path):
    return transformers_logits(path, random_ids(65))


class EveryWeightOne(ReferenceOps):
    def route(self, x, node, spec):
        routing = super().route(x, node, spec)
        return replace(routing, weights=torch.ones_like(routing.weights))


class WeightsOfOtherRanks(ReferenceOps):
    def route(self, x, node, spec):
        routing = super().route(x, node, spec)
        return Routing(routing.ids, routing.weights.flip(-1), routing.scores)


class OneExpertFewer(ReferenceOps):
    def route(self, x, node, spec):
        return super().route(x, node, replace(spec, num_experts_per_tok=spec.num_experts_per_tok - 1))


class GateAndUpSwapped(ReferenceOps):
    def silu_mul(self, gate, up):
        return super().silu_mul(up, gate)


class SigmoidScores(ReferenceOps):
    def route(self, x, node, spec):
        return super().route(x, node, replace(spec, scoring="sigmoid"))


class Renormalized(ReferenceOps):
    def route(self, x, node, spec):
        return super().route(x, node, replace(spec, is_renormalized=not spec.is_renormalized))


@pytest.mark.parametrize("variant", ["qwen3_moe untied", "qwen3_moe as they are"])
@pytest.mark.parametrize(
    "fault",
    [EveryWeightOne, WeightsOfOtherRanks, OneExpertFewer, GateAndUpSwapped, SigmoidScores, Renormalized],
)
def test_a_fault_of_the_ops_is_found(saved, variant, fault):
    model, parameters = load_parameters(saved(variant))
    expected = expected_logits(saved(variant))
    assert reference_error(model, parameters, ReferenceOps(), expected) <= REFERENCE_TOLERANCE
    assert reference_error(model, parameters, fault(), expected) > LIMIT


def test_a_fault_of_any_parameter_is_found(saved):
    """The experts or rows of a matrix in reverse order."""
    expected = expected_logits(saved())
    model, parameters = load_parameters(saved())
    for name, values in parameters.items():
        if ".mlp." in name:
            wrong = {**parameters, name: values.flip(0)}
            assert reference_error(model, wrong, ReferenceOps(), expected) > LIMIT, name


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("activations", ["int12", "mixed", "bf16", "f32"])
def test_packed_sequences_have_the_bits_of_lone_ones(saved, num_threads, activations):
    path = saved("qwen3_moe for llama.cpp")
    runner = load(load_runner, path, activations=activations, num_threads=num_threads)
    ids = random_ids(65, 512)
    alone = [all_logits(runner, ids[:n]) for n in (1, 17, 65)]
    together = runner.logits(packed_sequences([(ids[:n], n) for n in (1, 17, 65)], runner.block_size))
    assert np.array_equal(together, np.concatenate(alone))


def test_a_token_reads_the_experts_it_chooses(saved):
    with open_checkpoint(saved()) as checkpoint:
        model = model_of(checkpoint)
        cost = costs(model, checkpoint)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 2 * 64 + 2 * 16 + 8 * 64 + 3 * 3 * 24 * 64
    assert model.active_parameters() == 3 * layer + 64 + 2 * 96 * 64
    assert cost.weight_bytes == 4 * (3 * layer + 64 + 96 * 64)


def test_a_missing_expert_is_named(saved, tmp_path):
    tensors = load_file(saved() / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    (tmp_path / "config.json").write_text((saved() / "config.json").read_text())
    save_file({key: values for key, values in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=name):
        load(load_runner, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder_sparse_step", 0),
        ("mlp_only_layers", ["0"]),
        ("num_experts_per_tok", 9),
        ("num_experts_per_tok", 0),
        ("num_local_experts", 10**9),
        ("moe_intermediate_size", None),
    ],
)
def test_what_cannot_be_run_is_refused(saved, tmp_path, field, value):
    config = {**json.loads((saved() / "config.json").read_text()), field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((saved() / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=field), open_checkpoint(tmp_path) as checkpoint:
        model_of(checkpoint)
