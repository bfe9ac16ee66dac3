"""Random lies about the fields of small files: only WeightsError may come of it, soon, in little memory."""

from __future__ import annotations

import copy
import resource
import struct
import time

import numpy as np
import pytest
from gguf_bytes import BOOL, F32, GGUF, I32, STRING, U8, U32, Tensor, array, scalar
from test_gguf import assert_equal_to_reference

from jinn.weights.errors import WeightsError
from jinn.weights.gguf import GGUFFile

NUMBERS = [*range(14), 30, 31, 32, 33, 64, 255, 256, 1 << 16]
NUMBERS += [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
NUMBERS += [
    (1 << 59) + 1,
    (1 << 61) + 1,
    (1 << 62) + 1,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 32,
    (1 << 64) - 1,
]


def seed_file() -> GGUF:
    metadata = [
        ("general.architecture", scalar(STRING, "llama")),
        ("general.alignment", scalar(U32, 32)),
        ("block_count", scalar(U32, 2)),
        ("eps", scalar(F32, 1e-5)),
        ("flag", scalar(BOOL, True)),
        ("tokens", array(STRING, ["a", "", "Ġb"])),
        ("types", array(I32, [1, 2, 3])),
        ("bytes", array(U8, [1, 2])),
    ]
    tensors = [
        Tensor("a", (32, 2), 0, 0),
        Tensor("b", (64, 2), 8, 256),
        Tensor("c", (32, 2, 2), 3, 416),
        Tensor("d", (8,), 1, 512),
    ]
    return GGUF(metadata=metadata, tensors=tensors, data=bytes(range(256)) * 2 + bytes(16))


class Mutator:
    """Draws lies from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def pick(self, values):
        return values[int(self.rng.integers(len(values)))]

    def file(self) -> bytes:
        contents = copy.deepcopy(seed_file())
        for _ in range(int(self.rng.integers(0, 3))):
            self.pick([self.header, self.metadata, self.tensor, self.tensor, self.data])(contents)
        encoded = bytearray(contents.encode())
        if self.rng.random() < 0.4:
            self.overwrite(encoded, len(contents.header()))
        return bytes(encoded)

    def header(self, contents: GGUF) -> None:
        name = self.pick(["version", "tensor_count", "key_count", "metadata", "tensors"])
        if name in ("metadata", "tensors"):
            items = getattr(contents, name)
            items.append(copy.deepcopy(self.pick(items)))
        else:
            limit = 1 << 32 if name == "version" else 1 << 64
            setattr(contents, name, self.pick(NUMBERS) % limit)

    def metadata(self, contents: GGUF) -> None:
        index = int(self.rng.integers(len(contents.metadata)))
        key, value = contents.metadata[index]
        number = self.pick(NUMBERS)
        where = self.pick([0, 4, 8])  # the type, an array's element type, its count
        if where == 8:
            value = value[:8] + struct.pack("<Q", number) + value[16:]
        else:
            value = value[:where] + struct.pack("<I", number % (1 << 32)) + value[where + 4 :]
        contents.metadata[index] = (key, value)

    def tensor(self, contents: GGUF) -> None:
        tensor = self.pick(contents.tensors)
        number = self.pick(NUMBERS)
        name = self.pick(["dims", "type_id", "offset", "num_dims", "name_length", "name"])
        if name == "dims":
            dims = list(tensor.dims)
            dims[int(self.rng.integers(len(dims)))] = number
            tensor.dims = tuple(dims)
        elif name == "name":
            tensor.name = self.pick(["a", "b", "", "x" * 1000, "\n"])
        elif name == "offset":
            tensor.offset = self.pick([number, 32 * (number % 32)])
        elif name == "name_length":
            tensor.name_length = number
        else:
            setattr(tensor, name, number % (1 << 32))

    def data(self, contents: GGUF) -> None:
        contents.data = contents.data[: int(self.rng.integers(len(contents.data)))]

    def overwrite(self, encoded: bytearray, header_length: int) -> None:
        at = int(self.rng.integers(header_length))
        kind = self.pick(["byte", "number", "cut", "insert"])
        if kind == "byte":
            encoded[at] = int(self.rng.integers(256))
        elif kind == "number":
            encoded[at : at + 8] = struct.pack("<Q", self.pick(NUMBERS))
        elif kind == "cut":
            del encoded[at : at + int(self.rng.integers(1, 9))]
        else:
            encoded[at:at] = self.rng.bytes(int(self.rng.integers(1, 9)))


def refusal(path) -> WeightsError | None:
    """Why the file is refused, or None. Anything else that it raises fails the test."""
    try:
        GGUFFile(path).close()
    except WeightsError as error:
        return error
    return None


def fuzz(path, num_files: int, seed: int) -> int:
    """How many of the files were accepted."""
    mutator = Mutator(seed)
    num_accepted = 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(num_files):
        path.write_bytes(mutator.file())
        start = time.process_time()
        error = refusal(path)
        assert time.process_time() - start < 0.1, f"file {index} of seed {seed} is slow"
        if error is None:
            num_accepted += 1
            assert_equal_to_reference(path)
        else:
            assert "\n" not in str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10
    return num_accepted


def test_the_seed_file_is_valid(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(seed_file().encode())
    assert_equal_to_reference(path)


def test_mutated_files(tmp_path):
    assert 0 < fuzz(tmp_path / "model.gguf", 2000, seed=0) < 1500


@pytest.mark.soak
def test_many_mutated_files(tmp_path):
    fuzz(tmp_path / "model.gguf", 20_000, seed=1)
