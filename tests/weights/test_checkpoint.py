from __future__ import annotations

import json
import os

import numpy as np
import pytest

import tiny
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.quantize import dequantize


def values(checkpoint, name):
    tensor = checkpoint.tensors[name]
    return dequantize(checkpoint.data(name), tensor.format, tensor.shape)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_gguf_and_folder_hold_the_same_weights(tmp_path, num_shards):
    config = tiny.TinyLlama(tie_word_embeddings=False)
    with (
        open_checkpoint(tiny.tiny_llama_folder(tmp_path / "hf", config, num_shards)) as folder,
        open_checkpoint(tiny.tiny_llama_gguf(tmp_path / "model.gguf", config)) as gguf_file,
    ):
        assert (folder.kind, folder.architecture) == ("hf", "llama")
        assert (gguf_file.kind, gguf_file.architecture) == ("gguf", "llama")
        assert folder.config_source["hidden_size"] == gguf_file.config_source["llama.embedding_length"]
        assert folder.generation_config["eos_token_id"] == 2
        assert gguf_file.generation_config == {}
        assert len(folder.tensors) == len(gguf_file.tensors)
        for name, expected in tiny.tiny_llama_tensors(config).items():
            assert np.array_equal(values(folder, name), expected)
            if "q_proj" not in name and "k_proj" not in name:
                assert np.array_equal(values(gguf_file, tiny.gguf_name(name)), expected)
            folder.check_finite(name)
            folder.release(name)
            assert np.array_equal(values(folder, name), expected)


def test_gguf_rows_of_q_and_k_are_interleaved(tmp_path):
    """Within a head of d rows, GGUF's rows 2i and 2i + 1 are the checkpoint's i and i + d/2."""
    config = tiny.TinyLlama()
    checkpoint = open_checkpoint(tiny.tiny_llama_gguf(tmp_path / "model.gguf", config))
    original = tiny.tiny_llama_tensors(config)["model.layers.1.self_attn.k_proj.weight"]
    permuted = values(checkpoint, "blk.1.attn_k.weight")
    half = config.head_dim // 2
    for head in range(config.num_key_value_heads):
        base = head * config.head_dim
        for pair in range(half):
            assert np.array_equal(permuted[base + 2 * pair], original[base + pair])
            assert np.array_equal(permuted[base + 2 * pair + 1], original[base + pair + half])


def test_nan_weights_are_named_with_their_file(tmp_path):
    path = tiny.tiny_llama_gguf(tmp_path / "model.gguf", format_name="Q8_0")
    with open_checkpoint(path) as checkpoint:
        offset = checkpoint.tensors["blk.0.ffn_up.weight"].offset
    with path.open("r+b") as file:
        file.seek(offset + 34)
        file.write(b"\x00\x7c")
    with open_checkpoint(path) as checkpoint:
        checkpoint.check_finite("blk.1.ffn_up.weight")
        with pytest.raises(WeightsError, match=r"model\.gguf: tensor 'blk.0.ffn_up.weight': .* element 32"):
            checkpoint.check_finite("blk.0.ffn_up.weight")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            b"PK\x03\x04stuff",
            r"begins with b'PK\\x03\\x04', which is no known model; supported is",
        ),
        (b"", "begins with b''"),
        (b"GG", "begins with b'GG'"),
        (b"GGUF", "the version needs 4 bytes"),
    ],
)
def test_unknown_files_are_described(tmp_path, contents, message):
    path = tmp_path / "model.bin"
    path.write_bytes(contents)
    with pytest.raises(WeightsError, match=message):
        open_checkpoint(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(WeightsError, match=r"model\.gguf: cannot be opened: No such file"):
        open_checkpoint(tmp_path / "model.gguf")


def write_gguf(path, **metadata):
    writer = tiny.GGUFWriter(path, metadata.pop("architecture", "llama"))
    for key, value in metadata.items():
        writer.add_uint16(key.replace("_", "."), value)
    return tiny.write_gguf(writer, path)


def test_a_part_of_a_split_model_is_refused(tmp_path):
    open_checkpoint(write_gguf(tmp_path / "whole.gguf", split_count=1)).close()
    with pytest.raises(WeightsError, match=r"part.gguf: is one of several parts"):
        open_checkpoint(write_gguf(tmp_path / "part.gguf", split_count=3))


@pytest.mark.parametrize("value", [b"\x04\x00\x00\x00\x01\x00\x00\x00", None])
def test_an_architecture_that_is_no_string_is_refused(tmp_path, value):
    from gguf_bytes import GGUF

    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF(metadata=[("general.architecture", value)] if value else []).encode())
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightsError, match=r"'general\.architecture' is missing or not a string"):
        open_checkpoint(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_broken_folders(tmp_path):
    with pytest.raises(WeightsError, match=r"a folder without config\.json; supported is"):
        open_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    for text, message in [
        (b"{", r"config\.json: not valid JSON"),
        (b"[]", r"config\.json: holds a JSON list, not an object"),
        (b"{}", "model_type is missing or not a string"),
        (b'{"model_type": 1}', "model_type is missing or not a string"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ]:
        config.write_bytes(text)
        with pytest.raises(WeightsError, match=message) as caught:
            open_checkpoint(tmp_path)
        assert "\n" not in str(caught.value)
    config.write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"has neither .* pytorch_model\.bin can hold code"):
        open_checkpoint(tmp_path)


def test_a_missing_generation_config_is_empty(tmp_path):
    folder = tiny.tiny_llama_folder(tmp_path / "hf")
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).generation_config == {}
