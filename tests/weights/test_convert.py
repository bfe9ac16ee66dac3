"""Models from one file format to the other and back, against transformers and the gguf package's writer."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jinn.models.fields import ConfigError
from jinn.models.registry import model_of
from jinn.models.sources import parameter_sources
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.convert import convert
from jinn.weights.errors import WeightsError
from jinn.weights.quantize import dequantize
from models.gguf_models import NOT_IN_GGUF, gguf_of
from models.test_prediction import VARIANTS as PREDICTION_VARIANTS
from models.test_prediction import add_tensors, prediction_module, prediction_tensors
from models.transformers_models import (
    HYBRID_FAMILIES,
    VARIANTS,
    random_ids,
    random_model,
    transformers_logits,
)
from tiny import CHAT_TEMPLATE, tiny_llama_folder, tiny_llama_gguf, tiny_tokenizer

BY_VARIANT = pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in NOT_IN_GGUF])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function from a variant's name to its folder, written by transformers."""
    folder = tmp_path_factory.mktemp("saved")

    @cache
    def save(variant, dtype=torch.float32):
        path = folder / f"{variant} {dtype}".replace(" ", "_")
        random_model(variant).to(dtype).save_pretrained(path)
        if VARIANTS[variant][1].get("vocab_size", 0) >= 512:
            tiny_tokenizer().save(str(path / "tokenizer.json"))
            config = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
            (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return save


def contents(path):
    """Every tensor's type, shape and bytes."""
    with open_checkpoint(path) as checkpoint:
        return {
            name: (info.format.name, info.shape, bytes(checkpoint.data(name)))
            for name, info in checkpoint.tensors.items()
        }


def values(path):
    with open_checkpoint(path) as checkpoint:
        return {
            name: dequantize(checkpoint.data(name), info.format, info.shape)
            for name, info in checkpoint.tensors.items()
        }


def is_encoded(variant, name):
    """Whether GGUF has other numbers: 1 + weight, or -exp(A_log)."""
    is_norm = name.endswith("norm.weight") and "linear_attn" not in name
    return VARIANTS[variant][0] in HYBRID_FAMILIES and (is_norm or name.endswith("A_log"))


@BY_VARIANT
def test_a_folder_comes_back_from_gguf(saved, tmp_path, variant):
    folder = saved(variant)
    convert(folder, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "back")
    before, after = contents(folder), contents(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        if is_encoded(variant, name):
            numbers = [np.frombuffer(content[2], "<f4") for content in (before[name], after[name])]
            assert np.abs(numbers[0] - numbers[1]).max() <= 1e-6
        else:
            assert after[name] == before[name], name
    ids = random_ids(65)
    logits, expected = transformers_logits(tmp_path / "back", ids), transformers_logits(folder, ids)
    assert np.abs(logits - expected).max() <= 5e-5


@BY_VARIANT
def test_bfloat16_comes_back_in_every_bit(saved, tmp_path, variant):
    folder = saved(variant, torch.bfloat16)
    convert(folder, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(folder)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@BY_VARIANT
@pytest.mark.parametrize("type_name", ["f32", "bf16"])
def test_gguf_is_what_llama_cpp_would_write(saved, tmp_path, variant, type_name):
    """The same tensors, and a value under every key that the other writer has."""
    convert(saved(variant), tmp_path / "ours.gguf", type_name)
    gguf_of(saved(variant), tmp_path / "theirs.gguf", type_name.upper())
    ours, theirs = contents(tmp_path / "ours.gguf"), contents(tmp_path / "theirs.gguf")
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name == "rope_freqs.weight":
            assert np.allclose(np.frombuffer(ours[name][2], "<f4"), np.frombuffer(theirs[name][2], "<f4"))
        else:
            assert ours[name] == theirs[name], name
    with open_checkpoint(tmp_path / "ours.gguf") as mine, open_checkpoint(tmp_path / "theirs.gguf") as other:
        keys = [key for key in other.config_source if key.startswith(other.architecture)]
        assert len(keys) > 8
        for key in keys:
            assert mine.config_source[key] == pytest.approx(other.config_source[key]), key


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "q4_1", "q4_k", "q6_k", "f16"])
def test_quantising_says_what_it_costs(saved, tmp_path, type_name):
    folder = saved("qwen3_moe for llama.cpp")
    conversion = convert(folder, tmp_path / "model.gguf", type_name, num_threads=2)
    convert(folder, tmp_path / "exact.gguf")
    before, after = values(tmp_path / "exact.gguf"), values(tmp_path / "model.gguf")
    types = {name: content[0] for name, content in contents(tmp_path / "model.gguf").items()}
    assert [tensor.name for tensor in conversion.tensors] == list(after)
    for tensor in conversion.tensors:
        assert types[tensor.name] == tensor.type
        error = after[tensor.name] - before[tensor.name]
        expected = np.linalg.norm(error) / np.linalg.norm(before[tensor.name])
        assert tensor.rms_error == pytest.approx(expected, rel=1e-4)
        assert tensor.max_error == pytest.approx(np.abs(error).max(), rel=1e-6)
        assert (tensor.max_error == 0) == (tensor.type == "F32")
    assert types["blk.0.attn_q.weight"] == type_name.upper()
    assert types["blk.0.ffn_down_exps.weight"] == type_name.upper()
    assert types["output.weight"] == types["token_embd.weight"]
    assert types["token_embd.weight"] == ("Q6_K" if type_name.startswith("q4") else type_name.upper())
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.attn_norm.weight"] == "F32"


def test_rows_that_no_block_divides_get_a_type_that_does(tmp_path):
    convert(tiny_llama_gguf(tmp_path / "f32.gguf"), tmp_path / "q.gguf", "q4_k")
    types = {content[0] for content in contents(tmp_path / "q.gguf").values()}
    assert types == {"F32", "Q8_0"}


def test_a_quantised_file_keeps_its_bytes_and_its_metadata(saved, tmp_path):
    convert(saved("qwen3 for llama.cpp"), tmp_path / "q.gguf", "q4_0")
    convert(tmp_path / "q.gguf", tmp_path / "again.gguf")
    assert contents(tmp_path / "again.gguf") == contents(tmp_path / "q.gguf")
    convert(tmp_path / "q.gguf", tmp_path / "f32.gguf", "f32")
    assert {content[0] for content in contents(tmp_path / "f32.gguf").values()} == {"F32"}
    with open_checkpoint(tmp_path / "q.gguf") as one, open_checkpoint(tmp_path / "f32.gguf") as other:
        assert one.config_source.keys() == other.config_source.keys()
        assert one.config_source["tokenizer.ggml.tokens"] == other.config_source["tokenizer.ggml.tokens"]
        assert other.config_source["general.file_type"] == 0


def test_a_quantised_llama_keeps_its_blocks_in_the_rows_new_order(saved, tmp_path):
    """To a folder in f32, q and k unpermuted, and back: blocks quantised again are those of before."""
    convert(saved("llama for llama.cpp"), tmp_path / "q.gguf", "q8_0")
    convert(tmp_path / "q.gguf", tmp_path / "hf", "f32")
    convert(tmp_path / "hf", tmp_path / "again.gguf", "f32")
    again, before = values(tmp_path / "again.gguf"), values(tmp_path / "q.gguf")
    assert all(np.array_equal(again[name], before[name]) for name in before)


def test_a_quantised_file_becomes_bf16_in_a_folder(saved, tmp_path):
    convert(saved("qwen3 for llama.cpp"), tmp_path / "q.gguf", "q4_0")
    conversion = convert(tmp_path / "q.gguf", tmp_path / "hf")
    types = {tensor.name: tensor.type for tensor in conversion.tensors}
    assert types["model.layers.0.self_attn.q_proj.weight"] == "BF16"
    assert types["model.norm.weight"] == "F32"  # its values need more bits
    assert 0 < max(tensor.rms_error for tensor in conversion.tensors) < 2**-8


def test_stacked_experts_are_read(saved, tmp_path):
    folder = saved("qwen3_moe untied")
    model = random_model("qwen3_moe untied")
    tensors = {name: parameter.numpy() for name, parameter in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    (stacked / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, stacked / "model.safetensors")
    convert(stacked, tmp_path / "a.gguf")
    convert(folder, tmp_path / "b.gguf")
    assert contents(tmp_path / "a.gguf") == contents(tmp_path / "b.gguf")


@pytest.mark.parametrize("variant", PREDICTION_VARIANTS)
def test_a_prediction_module_comes_along_where_gguf_has_a_place(tmp_path, variant):
    folder = tmp_path / "folder"
    random_model(variant).save_pretrained(folder)
    plain = set(contents(folder))
    add_tensors(folder, prediction_tensors(variant, prediction_module(variant, folder)))
    conversion = convert(folder, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "back")
    before, after = values(folder), values(tmp_path / "back")
    if VARIANTS[variant][0].startswith("qwen3_5"):
        assert conversion.left_out == ()
        assert after.keys() == before.keys()
    else:
        assert "mtp.fc.weight" in conversion.left_out
        assert after.keys() == plain
    assert all(np.abs(after[name] - before[name]).max() <= 1e-6 for name in after)
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        parameter_sources(model_of(checkpoint), checkpoint)


@pytest.mark.parametrize("variant", NOT_IN_GGUF)
def test_what_gguf_has_no_key_for_is_refused(saved, tmp_path, variant):
    with pytest.raises(WeightsError, match=r"no key for config field \w+, so that it must be "):
        convert(saved(variant), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_kept_unless_forced(tmp_path):
    source = tiny_llama_gguf(tmp_path / "tiny.gguf")
    for target in (tmp_path / "target.gguf", tmp_path / "folder"):
        convert(source, target)
        before = contents(target)
        with pytest.raises(WeightsError, match="exists already; --force overwrites it"):
            convert(source, target, "bf16")
        assert contents(target) == before
        convert(source, target, "bf16", overwrite=True)
        assert contents(target) != before
    with pytest.raises(WeightsError, match="is the model to convert"):
        convert(source, source, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "target.gguf", "folder"}


@pytest.mark.parametrize("target", ["new.gguf", "new"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no space")], ids=["ctrl-c", "disk"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, target, error):
    source = tiny_llama_gguf(tmp_path / "tiny.gguf")

    def stop(done, total):
        if done > total / 2:
            raise error

    with pytest.raises(type(error)):
        convert(source, tmp_path / target, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_progress_ends_at_all_bytes(tmp_path):
    moves = []
    source = tiny_llama_gguf(tmp_path / "tiny.gguf")
    conversion = convert(source, tmp_path / "new.gguf", progress=lambda *move: moves.append(move))
    assert moves[-1] == (conversion.num_bytes, conversion.num_bytes)
    assert moves == sorted(moves)


@pytest.mark.parametrize(
    ("target", "type_name", "message"),
    [
        ("new", "q4_0", "type 'q4_0' is not one of f32, f16, bf16"),
        ("new.gguf", "q5_k", "type 'q5_k' is not one of f32, f16, bf16, q8_0, q4_0, q4_1, q4_k, q6_k"),
        ("missing/new.gguf", None, "missing: no such folder"),
    ],
)
def test_bad_targets_are_refused(tmp_path, target, type_name, message):
    source = tiny_llama_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(WeightsError, match=message):
        convert(source, tmp_path / target, type_name)


def test_bad_sources_are_refused(saved, tmp_path):
    folder = tiny_llama_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match=r"tensor 'model.layers.2.* is missing"):
        convert(folder, tmp_path / "new.gguf")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    with pytest.raises(ConfigError, match="'gemma3' is not supported"):
        convert(folder, tmp_path / "new.gguf")


def test_values_that_are_not_finite_are_refused(tmp_path):
    source = tiny_llama_gguf(tmp_path / "tiny.gguf")
    with open_checkpoint(source) as checkpoint:
        offset = checkpoint.tensors["blk.1.ffn_up.weight"].offset
    with source.open("r+b") as file:
        file.seek(offset + 40)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(WeightsError, match=r"'blk.1.ffn_up.weight': only finite values"):
        convert(source, tmp_path / "new.gguf", "q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]
