"""The llama family against transformers: logits, gradients, and faults that the comparison must find."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from jinn.engine.config import EngineConfig
from jinn.engine.loading import load_runner
from jinn.engine.reference_runner import ReferenceRunner, load_reference_runner, load_tensors
from jinn.models.parameters import tree
from jinn.models.registry import model_of
from jinn.ops.protocol import Context
from jinn.ops.reference import PagedCache, ReferenceOps, tensor_batch
from jinn.weights.checkpoint import open_checkpoint
from native.programs import packed_sequences
from tiny import TinyLlama, tiny_llama_folder, tiny_llama_gguf

from .transformers_llama import (
    BLOCK_SIZE,
    VARIANTS,
    all_logits,
    random_ids,
    random_llama,
    transformers_logits,
)

LENGTHS = (1, 2, 3, 63, 64, 65, 130)
REFERENCE_TOLERANCE = 5e-5  # transformers against itself, chunked or padded, differs by up to 3e-5
NATIVE_TOLERANCE = 1e-4
TINY = TinyLlama()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a variant's name to its folder."""
    folder = tmp_path_factory.mktemp("llama")

    @cache
    def save(variant):
        path = folder / variant.replace(" ", "_")
        random_llama(**VARIANTS[variant]).save_pretrained(path)
        return path

    return save


@cache
def expected_logits(path, count):
    return transformers_logits(path, random_ids(count))


def load(loader, path, **settings):
    settings = {"kv_cache_dtype": "f32", "activations": "f32", "num_threads": 1, **settings}
    config = EngineConfig(str(path), cache_memory=2**22, block_size=BLOCK_SIZE, **settings)
    return loader(config, lambda loaded, total: None)[0]


def largest_error(logits, expected):
    assert logits.shape == expected.shape
    return np.abs(logits - expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("loader", "tolerance"),
    [(load_reference_runner, REFERENCE_TOLERANCE), (load_runner, NATIVE_TOLERANCE)],
    ids=["reference", "native"],
)
def test_logits(saved, variant, loader, tolerance):
    """At every position of prompts of several lengths: a shorter prompt's are the first of the longer's."""
    path = saved(variant)
    runner = load(loader, path)
    expected = expected_logits(path, max(LENGTHS))
    assert np.abs(expected).max() > 1
    for length in LENGTHS:
        logits = all_logits(runner, random_ids(max(LENGTHS))[:length])
        assert largest_error(logits, expected[:length]) <= tolerance


@pytest.mark.parametrize("loader", [load_reference_runner, load_runner], ids=["reference", "native"])
@pytest.mark.parametrize("first", [1, 5, 16, 37, 64])
def test_a_split_prompt(saved, loader, first):
    """The second part reads the first from the cache."""
    ids, expected = random_ids(130)[:70], expected_logits(saved("llama3"), 130)[:70]
    runner = load(loader, saved("llama3"))
    parts = [all_logits(runner, ids[:first]), all_logits(runner, ids, start=first)]
    assert largest_error(np.concatenate(parts), expected) <= NATIVE_TOLERANCE


@pytest.mark.parametrize("loader", [load_reference_runner, load_runner], ids=["reference", "native"])
def test_packed_sequences(saved, loader):
    ids, expected = random_ids(130), expected_logits(saved("biased"), 130)
    logits = load(loader, saved("biased")).logits(
        packed_sequences([(ids[:n], n) for n in LENGTHS], BLOCK_SIZE)
    )
    assert largest_error(logits, np.concatenate([expected[:n] for n in LENGTHS])) <= NATIVE_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_weights(tmp_path, dtype):
    random_llama().to(dtype).save_pretrained(tmp_path)
    ids, expected = random_ids(65), transformers_logits(tmp_path, random_ids(65))
    for loader, tolerance in ((load_reference_runner, REFERENCE_TOLERANCE), (load_runner, NATIVE_TOLERANCE)):
        assert largest_error(all_logits(load(loader, tmp_path), ids), expected) <= tolerance


@pytest.mark.parametrize("is_tied", [True, False])
def test_gguf_and_folder_are_the_same_model(tmp_path, is_tied):
    """q and k are permuted in GGUF; undone, both files give the same bits, and transformers' logits."""
    config = replace(TINY, tie_word_embeddings=is_tied, num_key_value_heads=1, head_dim=24)
    folder = tiny_llama_folder(tmp_path / "hf", config, num_shards=2)
    gguf = tiny_llama_gguf(tmp_path / "tiny.gguf", config)
    ids = random_ids(65, config.vocab_size)
    expected = transformers_logits(folder, ids)
    for loader, tolerance in ((load_reference_runner, REFERENCE_TOLERANCE), (load_runner, NATIVE_TOLERANCE)):
        logits = [all_logits(load(loader, path), ids) for path in (folder, gguf)]
        assert np.array_equal(*logits)
        assert largest_error(logits[0], expected) <= tolerance


@pytest.mark.parametrize("variant", ["tied", "biased", "llama3"])
def test_gradients(saved, variant):
    """Of a loss over two packed sequences, for every parameter."""
    ids = random_ids(50)
    parts, targets = (ids[:20], ids[20:]), torch.tensor(random_ids(50, seed=1))
    theirs = random_llama(**VARIANTS[variant])
    logits = torch.cat([theirs(torch.tensor([part])).logits[0] for part in parts])
    torch.nn.functional.cross_entropy(logits, targets).backward()
    model, parameters = load_parameters(saved(variant))
    for parameter in parameters.values():
        parameter.requires_grad_()
    batch = tensor_batch(packed_sequences([(part, len(part)) for part in parts]))
    logits = model.forward(ReferenceOps(), tree(parameters), Context(batch))
    torch.nn.functional.cross_entropy(logits, targets).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(parameters) == set(expected)
    for name, parameter in parameters.items():
        size = float(expected[name].abs().max())
        assert size > 0
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * size)


def load_parameters(path):
    with open_checkpoint(path) as checkpoint:
        model = model_of(checkpoint)
        return model, load_tensors(model, checkpoint, lambda loaded, total: None)


def reference_error(model, parameters, ops, expected, ids):
    runner = ReferenceRunner(model, parameters, ops, PagedCache(model.kv_specs(), "f32", 16, BLOCK_SIZE))
    return largest_error(all_logits(runner, ids), expected)


class TiledHeads(ReferenceOps):
    """Query head h reads key/value head h % num_kv_heads."""

    def attention(self, q, k, v, ctx, spec, scale):
        groups = q.shape[1] // spec.key_dim // spec.num_kv_heads
        tiled = q.reshape(len(q), groups, spec.num_kv_heads, -1).transpose(1, 2).reshape(len(q), -1)
        y = super().attention(tiled, k, v, ctx, spec, scale)
        return y.reshape(len(q), spec.num_kv_heads, groups, -1).transpose(1, 2).reshape(len(q), -1)


class ShiftedKeys(ReferenceOps):
    """Keys stand one position later than queries."""

    def rope(self, x, ctx, rope, num_heads):
        shifted = replace(ctx.batch, positions=ctx.batch.positions + (num_heads == 2))
        return super().rope(x, Context(shifted), rope, num_heads)


def test_planted_faults_are_found(saved):
    """Each passes unchanged, and fails by far with one thing wrong."""
    path, ids = saved("biased"), random_ids(130)[:65]
    expected = expected_logits(path, 130)[:65]
    model, parameters = load_parameters(path)
    assert reference_error(model, parameters, ReferenceOps(), expected, ids) <= REFERENCE_TOLERANCE
    limit = 4 * NATIVE_TOLERANCE
    wrong_models = {
        "rope style": replace(model, rope=replace(model.rope, is_interleaved=True)),
        "rope frequencies": replace(model, rope=replace(model.rope, inv_freq=model.rope.inv_freq[::-1])),
        "attention factor": replace(model, rope=replace(model.rope, attention_factor=1.01)),
        "norm eps": replace(model, rms_norm_eps=1e-4),
        "tied head": replace(model, tie_word_embeddings=True),
    }
    for fault, wrong in wrong_models.items():
        assert reference_error(wrong, parameters, ReferenceOps(), expected, ids) > limit, fault
    for ops in (TiledHeads(), ShiftedKeys()):
        assert reference_error(model, parameters, ops, expected, ids) > limit, type(ops).__name__
    for name in parameters:
        values = parameters[name]
        wrong_values = values.flip(0) if "bias" in name or values.ndim == 2 else torch.ones_like(values)
        wrong = {**parameters, name: wrong_values}
        assert reference_error(model, wrong, ReferenceOps(), expected, ids) > limit, name


def test_a_missing_permutation_is_found(tmp_path):
    config = replace(TINY, num_key_value_heads=2)
    ids = random_ids(30, config.vocab_size)
    expected = transformers_logits(tiny_llama_folder(tmp_path / "hf", config), ids)
    path = tiny_llama_gguf(tmp_path / "tiny.gguf", config)
    for part in ("q_proj", "k_proj"):
        with open_checkpoint(path) as checkpoint:
            model = model_of(checkpoint)
            parameters = load_tensors(model, checkpoint, lambda loaded, total: None)
            origins = model.origins(checkpoint)
        for name in parameters:
            if part in name:
                back = np.argsort(origins[name].row_order)
                parameters[name] = parameters[name][back]
        assert reference_error(model, parameters, ReferenceOps(), expected, ids) > 4 * NATIVE_TOLERANCE
