"""Each family against transformers: logits, gradients, and faults that the comparison must find."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from jinn.engine.config import EngineConfig
from jinn.engine.loading import load_runner
from jinn.engine.reference_runner import ReferenceRunner, load_reference_runner, load_tensors
from jinn.models import layers
from jinn.models.decoder import Decoder
from jinn.models.llama import Llama
from jinn.models.parameters import NewFile, tree
from jinn.models.qwen3 import Qwen3
from jinn.models.registry import model_of
from jinn.ops.protocol import Context
from jinn.ops.reference import PagedCache, ReferenceOps, tensor_batch
from jinn.weights.checkpoint import open_checkpoint
from native.programs import packed_sequences
from tiny import TinyLlama, tiny_llama_folder, tiny_llama_gguf

from .gguf_models import NOT_IN_GGUF, gguf_of
from .transformers_models import (
    BLOCK_SIZE,
    VARIANTS,
    all_logits,
    random_ids,
    random_model,
    state_slots,
    transformers_logits,
)

LENGTHS = (1, 2, 3, 63, 64, 65, 130)
REFERENCE_TOLERANCE = 5e-5  # transformers against itself, chunked or padded, differs by up to 3e-5
NATIVE_TOLERANCE = 1e-4
# GGUF has rope divisors of its own, norms with 1 added and the exponential of A_log
REWRITTEN = ("llama3", "qwen3_next", "qwen3_5")
LOADERS = pytest.mark.parametrize(
    ("loader", "tolerance"),
    [(load_reference_runner, REFERENCE_TOLERANCE), (load_runner, NATIVE_TOLERANCE)],
    ids=["reference", "native"],
)
# one of each family, with all that its blocks can have
FULL = ("llama biased", "qwen2 untied", "qwen3 biased")
# what keeps recurrent states, or latents
HYBRIDS = ("qwen3_next untied", "qwen3_5 tied", "qwen3_5_moe untied", "deepseek_v3 untied")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a variant's name and a format ("hf" or a block format of GGUF) to its path."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def save(variant, kind="hf"):
        path = folder / f"{variant} {kind}".replace(" ", "_")
        if kind == "hf":
            random_model(variant).save_pretrained(path)
        else:
            gguf_of(save(variant), path, kind)
        return path

    return save


@cache
def expected_logits(path):
    return transformers_logits(path, random_ids(max(LENGTHS)))


def load(loader, path, **settings):
    settings = {"kv_cache_dtype": "f32", "activations": "f32", "num_threads": 1, **settings}
    config = EngineConfig(str(path), cache_memory=2**22, block_size=BLOCK_SIZE, **settings)
    return loader(config, lambda loaded, total: None)[0]


def largest_error(logits, expected):
    assert logits.shape == expected.shape
    return np.abs(logits - expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
@LOADERS
def test_logits(saved, variant, loader, tolerance):
    """At every position of prompts of several lengths: a shorter prompt's are the first of the longer's."""
    runner = load(loader, saved(variant))
    expected = expected_logits(saved(variant))
    assert np.abs(expected).max() > 1
    for length in LENGTHS:
        logits = all_logits(runner, random_ids(max(LENGTHS))[:length])
        assert largest_error(logits, expected[:length]) <= tolerance


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in NOT_IN_GGUF])
@LOADERS
def test_gguf_and_folder_are_the_same_model(saved, variant, loader, tolerance):
    """Both give transformers' logits, and the same bits but where GGUF has other numbers, rounded."""
    ids = random_ids(65)
    logits = [all_logits(load(loader, saved(variant, kind)), ids) for kind in ("hf", "F32")]
    assert largest_error(logits[1], expected_logits(saved(variant))[:65]) <= tolerance
    assert np.array_equal(*logits) or any(name in variant for name in REWRITTEN)


@pytest.mark.parametrize("variant", [*FULL, "qwen3 groups of three", "qwen3_moe biased", *HYBRIDS])
@pytest.mark.parametrize("cache_dtype", ["f32", "bf16", "int8"])
def test_steps_and_parts_give_the_bits_of_the_whole(saved, variant, cache_dtype):
    runner = load(load_runner, saved(variant), kv_cache_dtype=cache_dtype)
    check_steps_and_parts(runner, random_ids(67))


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "deepseek_v3"]
)
@pytest.mark.parametrize("activations", ["int12", "mixed", "bf16"])
def test_steps_and_parts_of_integer_weights(saved, family, activations):
    path = saved(f"{family} for llama.cpp", "Q8_0")
    runner = load(load_runner, path, activations=activations, num_threads=2)
    check_steps_and_parts(runner, random_ids(67, 512))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.endswith("for llama.cpp")])
def test_quantized_weights_are_those_of_the_file(saved, variant):
    path = saved(variant, "Q8_0")
    ids = random_ids(40, 512)
    native, reference = (
        all_logits(load(loader, path), ids) for loader in (load_runner, load_reference_runner)
    )
    assert largest_error(native, reference) <= NATIVE_TOLERANCE


def check_steps_and_parts(runner, ids):
    whole = all_logits(runner, ids)
    for cuts in ((1,), (16,), (37,), (64, 65), range(1, len(ids))):
        edges = [0, *cuts, len(ids)]
        parts = [all_logits(runner, ids[:end], start=start) for start, end in pairwise(edges)]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("variant", ["llama llama3", "qwen2 untied", "qwen3 yarn", *HYBRIDS])
@LOADERS
@pytest.mark.parametrize("first", [1, 5, 16, 37, 64])
def test_a_split_prompt(saved, variant, loader, tolerance, first):
    """The second part reads the first from the cache."""
    ids, expected = random_ids(130)[:70], expected_logits(saved(variant))[:70]
    runner = load(loader, saved(variant))
    parts = [all_logits(runner, ids[:first]), all_logits(runner, ids, start=first)]
    assert largest_error(np.concatenate(parts), expected) <= tolerance


@pytest.mark.parametrize("variant", [*FULL, *HYBRIDS])
@LOADERS
def test_packed_sequences(saved, variant, loader, tolerance):
    ids, expected = random_ids(130), expected_logits(saved(variant))
    batch = packed_sequences([(ids[:n], n) for n in LENGTHS], BLOCK_SIZE)
    batch = replace(batch, **state_slots(len(LENGTHS)))
    logits = load(loader, saved(variant)).logits(batch)
    assert largest_error(logits, np.concatenate([expected[:n] for n in LENGTHS])) <= tolerance


@pytest.mark.parametrize("variant", [*FULL, "qwen3_moe untied", *HYBRIDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_weights(tmp_path, variant, dtype):
    random_model(variant).to(dtype).save_pretrained(tmp_path)
    ids, expected = random_ids(65), transformers_logits(tmp_path, random_ids(65))
    for loader, tolerance in ((load_reference_runner, REFERENCE_TOLERANCE), (load_runner, NATIVE_TOLERANCE)):
        assert largest_error(all_logits(load(loader, tmp_path), ids), expected) <= tolerance


def test_a_folder_in_shards(tmp_path):
    folder = tiny_llama_folder(tmp_path / "hf", TinyLlama(), num_shards=2)
    gguf = tiny_llama_gguf(tmp_path / "tiny.gguf", TinyLlama())
    logits = [all_logits(load(load_runner, path), random_ids(20)) for path in (folder, gguf)]
    assert np.array_equal(*logits)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "for llama.cpp" not in name])
def test_gradients(saved, variant):
    """Of a loss over two packed sequences, for every parameter."""
    ids = random_ids(50)
    parts, targets = (ids[:20], ids[20:]), torch.tensor(random_ids(50, seed=1))
    theirs = random_model(variant)
    logits = torch.cat([theirs(torch.tensor([part])).logits[0] for part in parts])
    torch.nn.functional.cross_entropy(logits, targets).backward()
    model, parameters = load_parameters(saved(variant))
    for parameter in parameters.values():
        parameter.requires_grad_()
    batch = tensor_batch(packed_sequences([(part, len(part)) for part in parts]))
    logits = model.forward(ReferenceOps(), tree(parameters), Context(batch))
    torch.nn.functional.cross_entropy(logits, targets).backward()
    expected = arranged_gradients(model, theirs)
    assert {name for name in parameters if name not in expected} == without_gradients(parameters)
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        assert size > 0
        torch.testing.assert_close(parameters[name].grad, gradient, rtol=1e-3, atol=1e-4 * size)


def arranged_gradients(model, theirs):
    """The gradients of transformers' parameters as jinn has them: apart, stacked, or rows for columns."""
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    origins, specs = model.origins(NewFile("hf", gradients)), model.parameters()
    used = {tensor for origin in origins.values() for tensor in origin.names}
    assert used == {*gradients, *without_gradients(specs)}
    return {
        name: torch.from_numpy(origin.read([gradients[tensor] for tensor in origin.names], specs[name]))
        for name, origin in origins.items()
        if name not in without_gradients(specs)
    }


def without_gradients(names):
    return {name for name in names if name.endswith("e_score_correction_bias")}


def load_parameters(path, family=None):
    """The model and its tensors; as if it were of another family where one is given."""
    with open_checkpoint(path) as checkpoint:
        model = model_of(checkpoint)
        if family is not None:
            model = as_family(family, model)
        return model, load_tensors(model, checkpoint, lambda loaded, total: None)


def as_family(family, model):
    return family(**{field.name: getattr(model, field.name) for field in fields(model)})


def reference_error(model, parameters, ops, expected):
    runner = ReferenceRunner(model, parameters, ops, PagedCache(model.kv_specs(), "f32", 16, BLOCK_SIZE))
    return largest_error(all_logits(runner, random_ids(130)[: len(expected)]), expected)


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


class NormOfAllHeads(ReferenceOps):
    """One mean over all columns, not one per head."""

    def rms_norm(self, x, node, eps, offset=0.0):
        runs = x.shape[1] // len(node.weight)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y * node.weight.repeat(runs)


class NormAfterRope(Qwen3):
    def attention(self, ops, params, x, ctx):
        q, k, v = ops.linear(x, [params.q_proj, params.k_proj, params.v_proj], ctx)
        q = ops.rms_norm(ops.rope(q, ctx, self.rope, self.num_attention_heads), params.q_norm, 1e-5)
        k = ops.rms_norm(ops.rope(k, ctx, self.rope, self.num_key_value_heads), params.k_norm, 1e-5)
        unrotated = replace(self.rope, inv_freq=(0.0,) * len(self.rope.inv_freq))
        return layers.attend(ops, params, q, k, v, ctx, self.head_dim, unrotated)


class NoNorm(Qwen3):
    def attention(self, ops, params, x, ctx):
        return layers.attention(ops, params, x, ctx, self.head_dim, self.rope)


def rope_change(**changes):
    return lambda model: replace(model, rope=replace(model.rope, **changes))


def reversed_frequencies(model):
    return rope_change(inv_freq=model.rope.inv_freq[::-1])(model)


MODEL_FAULTS = {
    "rope style": (FULL, rope_change(is_interleaved=True)),
    "rope frequencies": (FULL, reversed_frequencies),
    "attention factor": ((*FULL, "qwen2 yarn", "qwen3 yarn"), rope_change(attention_factor=1.01)),
    "attention factor left out": (("qwen2 yarn", "qwen3 yarn"), rope_change(attention_factor=1.0)),
    "norm eps": (FULL, lambda model: replace(model, rms_norm_eps=1e-4)),
    "tied head": (FULL, lambda model: replace(model, tie_word_embeddings=True)),
    "norm after rope": (("qwen3 untied",), lambda model: as_family(NormAfterRope, model)),
    "norm missing": (("qwen3 untied",), lambda model: as_family(NoNorm, model)),
}
OPS_FAULTS = {
    "head map": (FULL, TiledHeads),
    "shifted keys": (FULL, ShiftedKeys),
    "norm of all heads": (("qwen3 untied",), NormOfAllHeads),
}
LIMIT = 4 * NATIVE_TOLERANCE


def cases(table):
    return [
        pytest.param(variant, fault, id=f"{fault}-{variant}")
        for fault in table
        for variant in table[fault][0]
    ]


@pytest.mark.parametrize(("variant", "fault"), cases(MODEL_FAULTS))
def test_a_fault_of_the_model_is_found(saved, variant, fault):
    expected = expected_logits(saved(variant))[:65]
    model, parameters = load_parameters(saved(variant))
    assert reference_error(model, parameters, ReferenceOps(), expected) <= REFERENCE_TOLERANCE
    assert reference_error(MODEL_FAULTS[fault][1](model), parameters, ReferenceOps(), expected) > LIMIT


@pytest.mark.parametrize(("variant", "fault"), cases(OPS_FAULTS))
def test_a_fault_of_the_ops_is_found(saved, variant, fault):
    expected = expected_logits(saved(variant))[:65]
    model, parameters = load_parameters(saved(variant))
    assert reference_error(model, parameters, OPS_FAULTS[fault][1](), expected) > LIMIT


@pytest.mark.parametrize("variant", FULL)
def test_a_fault_of_any_parameter_is_found(saved, variant):
    """Rows of a matrix or numbers of a bias in reverse order, or a norm of ones."""
    expected = expected_logits(saved(variant))[:65]
    model, parameters = load_parameters(saved(variant))
    for name, values in parameters.items():
        wrong_values = values.flip(0) if "bias" in name or values.ndim == 2 else torch.ones_like(values)
        wrong = {**parameters, name: wrong_values}
        assert reference_error(model, wrong, ReferenceOps(), expected) > LIMIT, name


@pytest.mark.parametrize("variant", FULL)
@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.k_proj"])
def test_a_wrong_permutation_is_found(saved, variant, part):
    """Llama's GGUF keeps q and k in another order, Qwen's does not: each read as the other is wrong."""
    expected = expected_logits(saved(variant))[:65]
    path = saved(variant, "F32")
    right, parameters = load_parameters(path)
    assert reference_error(right, parameters, ReferenceOps(), expected) <= REFERENCE_TOLERANCE
    other = Decoder.gguf_row_order if right.family == "llama" else Llama.gguf_row_order

    class Wrong(type(right)):
        def gguf_row_order(self, name):
            return other(self, name) if name == part else super().gguf_row_order(name)

    assert reference_error(*load_parameters(path, Wrong), ReferenceOps(), expected) > LIMIT
