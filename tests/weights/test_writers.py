"""GGUF and safetensors files as the formats' own packages read them."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from jinn.weights.block_formats import F16, F32, Q4_0
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.gguf import GGUFFile
from jinn.weights.gguf_writer import write_gguf
from jinn.weights.output import OutputTensor
from jinn.weights.quantize import quantize
from jinn.weights.safetensors_writer import write_safetensors


def tensor(name, values, block_format=F32, num_chunks=1):
    data = quantize(values, block_format)
    return OutputTensor(name, block_format, values.shape, lambda: iter(np.array_split(data, num_chunks)))


def ignore(done, total):
    pass


VALUES = {
    "matrix": np.arange(6 * 32, dtype=np.float32).reshape(6, 32),
    "vector": np.arange(5, dtype=np.float32),
    "stack": np.ones((2, 3, 64), np.float32),
}
METADATA = {
    "general.architecture": "llama",
    "a.true": True,
    "a.small": 3,
    "a.large": 2**40,
    "a.negative": -3,
    "a.float": 0.5,
    "a.text": "über\n",
    "a.texts": ["", "a", "ü"],
    "a.integers": np.array([1, -2], np.int32),
    "a.flags": np.array([True, False]),
    "a.nothing": np.array([], np.float32),
}


def test_the_gguf_package_reads_all_of_it(tmp_path):
    tensors = [tensor(name, values, num_chunks=3) for name, values in VALUES.items()]
    moves = []
    write_gguf(tmp_path / "a.gguf", METADATA, tensors, lambda *move: moves.append(move))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    for key, value in METADATA.items():
        found = reader.fields[key].contents()
        assert list(found) == list(value) if isinstance(value, list | np.ndarray) else found == value
    assert reader.fields["a.small"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["a.integers"].types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert [entry.name for entry in reader.tensors] == list(VALUES)
    for entry in reader.tensors:
        assert entry.data_offset % 32 == 0
        assert np.array_equal(entry.data, VALUES[entry.name])
    total = sum(values.nbytes for values in VALUES.values())
    assert moves[-1] == (total, total)


KEYS = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=12)
SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=20)
    | st.floats(width=32, allow_nan=False)
)
ARRAYS = st.lists(st.text(max_size=5), min_size=1, max_size=4)


@given(metadata=st.dictionaries(KEYS, SCALARS | ARRAYS, max_size=8))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, metadata):
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    metadata.pop("general.alignment", None)
    write_gguf(path, metadata, [tensor("w", np.ones(32, np.float32), Q4_0)], ignore)
    with GGUFFile(path) as file:
        assert file.metadata == metadata
        assert list(file.tensors) == ["w"]


def test_a_tensor_of_the_wrong_size_is_an_error(tmp_path):
    wrong = OutputTensor("w", F32, (3,), lambda: iter([np.zeros(8, np.uint8)]))
    with pytest.raises(ValueError, match="tensor 'w' takes 12 bytes, and was given 8"):
        write_gguf(tmp_path / "a.gguf", {}, [wrong], ignore)
    with pytest.raises(ValueError, match="tensor 'w' takes 12 bytes, and was given 8"):
        write_safetensors(tmp_path, [wrong], ignore)


def test_one_file_of_safetensors(tmp_path):
    write_safetensors(tmp_path, [tensor(name, values, F16) for name, values in VALUES.items()], ignore)
    found = load_file(tmp_path / "model.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors"}
    assert found.keys() == VALUES.keys()
    assert all(np.array_equal(found[name], values.astype(np.float16)) for name, values in VALUES.items())


def test_shards_have_an_index(tmp_path):
    tensors = [tensor(name, values) for name, values in VALUES.items()]
    write_safetensors(tmp_path, tensors, ignore, max_shard_bytes=780)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "model.safetensors.index.json"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"matrix": names[0], "vector": names[1], "stack": names[2]}
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in VALUES.values())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with open_checkpoint(tmp_path) as checkpoint:
        for name, values in VALUES.items():
            assert bytes(checkpoint.data(name)) == values.tobytes()
