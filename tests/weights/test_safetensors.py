from __future__ import annotations

import json
import os
import resource
import struct
import time

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import tiny
from jinn.weights.errors import WeightsError
from jinn.weights.model_folder import read_config, read_generation_config
from jinn.weights.safetensors import INDEX_FILE, SafetensorsFile, SafetensorsFolder


def encode(header, data: bytes = b"", length: int | None = None) -> bytes:
    """A file whose header's length may lie; `header` is an object or the header's own bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + data


def entry(dtype="F32", shape=(2, 4), begin=0, end=32, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def assert_equal_to_reference(path):
    """Every name, shape and byte as the safetensors package reads them."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    file = SafetensorsFile(path)
    with safe_open(path, framework="pt") as reference:
        assert sorted(file.tensors) == sorted(reference.keys())
        for name, tensor in file.tensors.items():
            expected = reference.get_tensor(name)
            assert tensor.shape == tuple(expected.shape)
            assert dtypes[tensor.format.name] == expected.dtype
            raw = expected.contiguous().flatten().view(torch.uint8)
            assert bytes(file.data(name)) == raw.numpy().tobytes()
    file.close()


def test_reads_what_the_safetensors_package_writes(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}.{index}": torch.randn(shape, generator=generator).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for index, shape in enumerate([(), (1,), (3,), (5, 7), (2, 3, 4), (1, 1, 1, 1, 2)])
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_equal_to_reference(tmp_path / "model.safetensors")


def test_reads_padded_headers_and_unaligned_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    header = json.dumps({"a": entry("F16", (1,), 0, 2), "b": entry("F32", (1,), 2, 6)}).encode()
    path.write_bytes(encode(header + b" " * 5, bytes(range(6))))
    assert_equal_to_reference(path)


TWO = {"a": entry(), "b": entry(begin=32, end=64)}
U64_MAX = 2**64 - 1
LIES = {
    "empty": (b"", "the file is empty"),
    "seven_bytes": (bytes(7), "the header's length needs 8 bytes, the file has 7"),
    "length_0": (encode(b""), "begins with b'', not an object"),
    "length_past_end": (encode({"a": entry()}, bytes(32), length=1 << 20), "length is 1048576, but at most"),
    "length_max": (encode({"a": entry()}, bytes(32), length=U64_MAX), "length is 18446744073709551615"),
    "not_json": (encode(b"{nothing}"), "not valid JSON"),
    "not_utf8": (encode(b'{"\xff": 1}'), "not valid JSON"),
    "list": (encode(b"[]"), "begins with b'\\[', not an object"),
    "leading_space": (encode(b" {}"), "begins with b' ', not an object"),
    "deep": (encode(b'{"a":' * 50_000), "nested too deeply"),
    "long_number": (encode(b'{"a":' + b"1" * 10_000 + b"}"), "not valid JSON"),
    "surrogate": (encode(b'{"\\ud800": {}}'), "a name that is not valid Unicode"),
    "duplicate": (encode(b'{"a": {}, "a": {}}'), "key 'a' appears twice"),
    "duplicate_field": (encode(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "key 'dtype' appears twice"),
    "metadata_list": (encode({"__metadata__": []}), "does not map strings to strings"),
    "metadata_number": (encode({"__metadata__": {"a": 1}}), "does not map strings to strings"),
    "entry_list": (encode({"a": []}), "'a' is not described by an object"),
    "entry_empty": (encode({"a": {}}), "'a' has a dtype that is not a string"),
    "dtype_unknown": (
        encode({"a": entry("F8_E5M2", (32,))}, bytes(32)),
        "has dtype 'F8_E5M2'; supported are F32",
    ),
    "dtype_list": (encode({"a": entry([], (32,))}, bytes(32)), "has a dtype that is not a string"),
    "shape_missing": (encode({"a": {"dtype": "F32", "data_offsets": [0, 32]}}, bytes(32)), "has a shape"),
    "shape_negative": (encode({"a": entry(shape=(-2, -4))}, bytes(32)), "has a shape"),
    "shape_float": (encode({"a": entry(shape=(2.0, 4))}, bytes(32)), "has a shape"),
    "shape_bool": (encode({"a": entry(shape=(True, 8))}, bytes(32)), "has a shape"),
    "shape_zero": (encode({"a": entry(shape=(0, 4), end=0)}), "has a shape"),
    "shape_huge": (encode({"a": entry(shape=(2**64,))}, bytes(32)), "has a shape"),
    "shape_wraps": (encode({"a": entry(shape=(2**62 + 2, 4))}, bytes(32)), "data_offsets span 32"),
    "shape_too_long": (encode({"a": entry(shape=(1,) * 100)}, bytes(32)), "has a shape"),
    "size": (encode({"a": entry(shape=(2, 5))}, bytes(32)), r"is F32 \[2, 5\], 40 bytes, but .* span 32"),
    "offsets_three": (
        encode({"a": entry() | {"data_offsets": [0, 16, 32]}}, bytes(32)),
        "data_offsets that are",
    ),
    "offsets_backwards": (encode({"a": entry(begin=32, end=0)}, bytes(32)), "span -32"),
    "offsets_float": (encode({"a": entry(end=32.0)}, bytes(32)), "data_offsets that are not"),
    "outside": (encode({"a": entry()}, bytes(31)), "past the end of the file"),
    "outside_far": (encode({"a": entry(begin=2**63, end=2**63 + 32)}, bytes(32)), "past the end of the file"),
    "overlap": (encode({"a": entry(), "b": entry(begin=16, end=48)}, bytes(48)), "'b' overlaps tensor 'a'"),
    "same_place": (encode({"a": entry(), "b": entry()}, bytes(32)), "overlaps tensor"),
    "gap": (encode({"a": entry(), "b": entry(begin=36, end=68)}, bytes(68)), "describes 64 bytes .* has 68"),
    "gap_first": (encode({"a": entry(begin=4, end=36)}, bytes(36)), "describes 32 bytes .* has 36"),
    "rest": (encode(TWO, bytes(65)), "describes 64 bytes of tensors, the file has 65"),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_one_clear_line(tmp_path, name):
    contents, message = LIES[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents)
    open_before = len(os.listdir("/proc/self/fd"))
    start = time.process_time()
    with pytest.raises(WeightsError, match=message) as caught:
        SafetensorsFile(path)
    assert time.process_time() - start < 0.1
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_the_files_the_lies_are_told_about_are_valid(tmp_path):
    path = tmp_path / "model.safetensors"
    for contents in (encode(TWO, bytes(64)), encode({"a": entry(extra=1)}, bytes(32)), encode(b"{}")):
        path.write_bytes(contents)
        assert_equal_to_reference(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(TWO | {"__metadata__": {"format": "pt"}}, bytes(64)))
    for cut in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, cut)
        with pytest.raises(WeightsError):
            SafetensorsFile(path)


def test_a_long_header_in_a_long_file_allocates_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode({"a": entry()}, bytes(32), length=2**34))
    os.truncate(path, 2**36)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError, match="at most 100000000 is possible"):
        SafetensorsFile(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_a_hundred_thousand_tensors_open_in_seconds(tmp_path):
    header = {f"model.layers.{i}.weight": entry("F16", (1,), 2 * i, 2 * i + 2) for i in range(100_000)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(header, bytes(200_000)))
    start = time.process_time()
    assert len(SafetensorsFile(path).tensors) == 100_000
    assert time.process_time() - start < 5


def mutate(rng, contents: bytes) -> bytes:
    """Change the header's JSON at a token, or any byte."""
    (length,) = struct.unpack_from("<Q", contents)
    tokens = (
        contents[8 : 8 + length]
        .decode()
        .replace("[", " [ ")
        .replace("]", " ] ")
        .replace(",", " , ")
        .split(" ")
    )
    values = [
        "0",
        "1",
        "-1",
        "2",
        "4",
        "8",
        "16",
        "32",
        "33",
        "1e3",
        "2.0",
        "true",
        "null",
        "{}",
        "[]",
        "[",
        "}",
    ]
    values += [
        '"F16"',
        '"BF16"',
        '"I64"',
        '"a"',
        '"shape"',
        str(2**62 + 2),
        str(2**63),
        str(2**64),
        "NaN",
        "",
    ]
    for _ in range(int(rng.integers(0, 3))):
        tokens[int(rng.integers(len(tokens)))] = values[int(rng.integers(len(values)))]
    changed = bytearray(encode(" ".join(tokens).encode(), contents[8 + length :]))
    if rng.random() < 0.3:
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    if rng.random() < 0.1:
        del changed[int(rng.integers(len(changed))) :]
    return bytes(changed)


def reference_reads(path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except SafetensorError:
        return False


def fuzz(path, num_files: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    original = encode(TWO | {"c": entry("BF16", (3,), 64, 70), "__metadata__": {"format": "pt"}}, bytes(70))
    num_accepted = 0
    for index in range(num_files):
        path.write_bytes(mutate(rng, original))
        start = time.process_time()
        try:
            SafetensorsFile(path).close()
        except WeightsError:
            continue
        finally:
            assert time.process_time() - start < 0.1, f"file {index} of seed {seed} is slow"
        num_accepted += 1
        assert reference_reads(path), f"file {index} of seed {seed} is accepted"
        assert_equal_to_reference(path)
    assert num_files // 10 < num_accepted < num_files


def test_mutated_files(tmp_path):
    fuzz(tmp_path / "model.safetensors", 3000, seed=0)


@pytest.mark.soak
def test_many_mutated_files(tmp_path):
    fuzz(tmp_path / "model.safetensors", 30_000, seed=1)


@pytest.fixture
def sharded(tmp_path):
    return tiny.tiny_llama_folder(tmp_path / "hf", num_shards=2)


def edit_index(folder, edit) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index["weight_map"])
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_a_sharded_folder(sharded):
    with SafetensorsFolder(sharded) as folder:
        for name, expected in tiny.tiny_llama_tensors().items():
            assert folder.tensors[name].shape == expected.shape
            assert bytes(folder.data(name)) == expected.tobytes()
        with pytest.raises(KeyError):
            folder.data("nothing")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "..",
        "sub/x.safetensors",
        "a\\b.safetensors",
        "\0.safetensors",
    ],
)
def test_an_index_cannot_leave_the_folder(sharded, name):
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(WeightsError, match=r"is not a plain file name|is not in a \.safetensors file"):
        SafetensorsFolder(sharded)


def test_a_link_cannot_leave_the_folder(sharded, tmp_path):
    shard = next(sharded.glob("model-00001*"))
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(WeightsError, match="leads out of the model's folder"):
        SafetensorsFolder(sharded)
    shard.unlink()
    (tmp_path / "elsewhere.safetensors").rename(sharded / "inside.safetensors")
    shard.symlink_to("inside.safetensors")
    SafetensorsFolder(sharded).close()


def test_links_of_a_huggingface_cache_are_followed(tmp_path):
    snapshot = tiny.tiny_llama_folder(tmp_path / "repo" / "snapshots" / "c0ffee")
    blobs = tmp_path / "repo" / "blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    with SafetensorsFolder(snapshot) as folder:
        assert len(folder.tensors) == 20
    assert read_config(snapshot)["model_type"] == "llama"
    (snapshot / "generation_config.json").unlink()
    (snapshot / "generation_config.json").symlink_to("/etc/passwd")
    with pytest.raises(WeightsError, match="leads out"):
        read_generation_config(snapshot)


def test_an_index_that_disagrees_with_its_shards(sharded):
    first, second = sorted(path.name for path in sharded.glob("*.safetensors"))
    edit_index(sharded, lambda weight_map: weight_map.update({"missing": first}))
    with pytest.raises(WeightsError, match="tensor 'missing' is not in 'model-00001-of-00002"):
        SafetensorsFolder(sharded)
    edit_index(sharded, lambda weight_map: weight_map.pop("missing"))
    (sharded / second).write_bytes((sharded / first).read_bytes())
    with pytest.raises(WeightsError, match="is also in model-00001-of-00002"):
        SafetensorsFolder(sharded)
    (sharded / second).unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors: cannot be opened"):
        SafetensorsFolder(sharded)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_broken_indexes(sharded, text):
    (sharded / INDEX_FILE).write_text(text)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json") as caught:
        SafetensorsFolder(sharded)
    assert "\n" not in str(caught.value)
