from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, BOOL, F32, F64, GGUF, I64, STRING, U8, U32, Tensor, array, scalar, text

import tiny
from jinn.weights.block_formats import FORMATS, GGML_TYPE_NAMES
from jinn.weights.errors import WeightsError
from jinn.weights.gguf import GGUFFile
from jinn.weights.hub import resolve_model
from jinn.weights.quantize import QUANTIZABLE

HUGE = 2**63
ARCHITECTURE = ("general.architecture", scalar(STRING, "llama"))


def write(path, contents: GGUF | bytes):
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


def plain(value):
    return value.tolist() if isinstance(value, np.ndarray) else value


def assert_equal_to_reference(path):
    """Every key, shape and byte as the gguf package reads them."""
    reference = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        keys = {key: field for key, field in reference.fields.items() if not key.startswith("GGUF.")}
        assert list(file.metadata) == list(keys)
        for key, expected in keys.items():
            np.testing.assert_equal(plain(file.metadata[key]), expected.contents(), key)  # NaN equals NaN
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for expected in reference.tensors:
            tensor = file.tensors[expected.name]
            assert tensor.format.name == expected.tensor_type.name
            assert tensor.shape == tuple(reversed(expected.shape.tolist()))
            assert (tensor.offset, tensor.nbytes) == (expected.data_offset, expected.n_bytes)
            assert bytes(file.data(expected.name)) == expected.data.tobytes()
            end = tensor.offset + tensor.nbytes
            assert bytes(file.mapping()[tensor.offset : end]) == expected.data.tobytes()


@pytest.mark.parametrize("format_name", [name for name in QUANTIZABLE if not name.endswith("_K")])
def test_reads_what_the_gguf_package_writes(tmp_path, format_name):
    path = tiny.tiny_llama_gguf(tmp_path / "model.gguf", format_name=format_name)
    assert_equal_to_reference(path)


def test_reads_every_kind_of_metadata(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 255)
    writer.add_int8("i8", -128)
    writer.add_uint16("u16", 65535)
    writer.add_int16("i16", -32768)
    writer.add_uint32("u32", 2**32 - 1)
    writer.add_int32("i32", -(2**31))
    writer.add_uint64("u64", 2**64 - 1)
    writer.add_int64("i64", -(2**63))
    writer.add_float32("f32", 1.5)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "Ġ🙂\n")
    writer.add_array("texts", ["", "Ġt", "🙂"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.0])
    writer.add_array("bools", [True, False])
    tiny.add_tensor(writer, "one.four", np.ones((2, 3, 4, 32), np.float32), "Q8_0")
    tiny.add_tensor(writer, "vector", np.arange(5, dtype=np.float32), "F32")
    assert_equal_to_reference(tiny.write_gguf(writer, path))
    metadata = GGUFFile(path).metadata
    assert metadata["yes"] is True
    assert metadata["texts"] == ["", "Ġt", "🙂"]
    assert isinstance(metadata["ints"], np.ndarray)
    assert metadata["bools"].dtype == np.bool_


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_reads_other_alignments(tmp_path, alignment):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    tiny.add_tensor(writer, "a", np.ones((1, 32), np.float32), "Q4_0")
    tiny.add_tensor(writer, "b", np.ones(7, np.float32), "F32")
    assert_equal_to_reference(tiny.write_gguf(writer, path))


def test_reads_version_2_and_a_file_without_tensors(tmp_path):
    file = GGUFFile(write(tmp_path / "a.gguf", GGUF(version=2)))
    assert file.tensors["weight"].shape == (2, 32)
    empty = GGUFFile(write(tmp_path / "b.gguf", GGUF(tensors=[], data=b"")))
    assert (empty.tensors, empty.metadata) == ({}, {"general.architecture": "llama"})


def test_reads_empty_arrays_at_the_end_of_the_file(tmp_path):
    for type_id in (STRING, U32):
        contents = GGUF(metadata=[("empty", array(type_id, []))], tensors=[]).header()
        assert len(GGUFFile(write(tmp_path / "model.gguf", contents)).metadata["empty"]) == 0


def test_a_header_larger_than_the_first_window(tmp_path, monkeypatch):
    monkeypatch.setattr("jinn.weights.gguf._WINDOW_BYTES", 64)
    texts = ["x" * length for length in range(50)]
    metadata = [ARCHITECTURE, ("texts", array(STRING, texts)), ("numbers", array(U32, range(100)))]
    file = GGUFFile(write(tmp_path / "model.gguf", GGUF(metadata=metadata)))
    assert file.metadata["texts"] == texts
    assert file.metadata["numbers"].tolist() == list(range(100))
    assert "weight" in file.tensors


def packaged():
    return resolve_model(None)


def test_the_packaged_model_opens_fast():
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        GGUFFile(packaged()).close()
        best = min(best, time.process_time() - start)
    assert best < 0.15  # measured: 0.03 on an idle machine


@pytest.mark.soak
def test_the_packaged_model_as_the_gguf_package_reads_it():
    assert_equal_to_reference(packaged())


U64_MAX = 2**64 - 1
LIES = {
    "magic": (GGUF(magic=b"GGML"), "not a GGUF file: it begins with b'GGML'"),
    "zip": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "four_bytes": (b"GGUF", "the version needs 4 bytes"),
    "three_bytes": (b"GGU", "the magic needs 4 bytes"),
    "empty": (b"", "the file is empty"),
    "version_0": (GGUF(version=0), "not supported"),
    "version_1": (GGUF(version=1), "version 1 is not supported"),
    "version_4": (GGUF(version=4), "version 4 is not supported"),
    "big_endian": (GGUF(version=3 << 24), "big-endian GGUF is not supported"),
    "tensor_count": (GGUF(tensor_count=HUGE), "number of tensors is 9223372036854775808"),
    "tensor_count_max": (GGUF(tensor_count=U64_MAX), "number of tensors"),
    "tensor_count_off_by_one": (GGUF(tensor_count=2, data=b""), "tensor '' has 0 dimensions"),
    "key_count": (GGUF(key_count=HUGE), "number of metadata keys is"),
    "key_count_fits_nothing": (GGUF(key_count=1000), "number of metadata keys is 1000, but at most"),
    "key_length": (
        struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, HUGE) + bytes(64),
        "name of metadata key 0 needs",
    ),
    "key_not_utf8": (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + text(b"\xff\xfe") + scalar(U8, 1),
        "not valid UTF-8",
    ),
    "value_not_utf8": (
        GGUF(metadata=[("name", struct.pack("<I", STRING) + text(b"\xc3"))]),
        "string 0 of metadata key 'name' is not valid UTF-8",
    ),
    "token_not_utf8": (
        GGUF(
            metadata=[("tokens", struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + text(b"\xed\xa0\x80"))]
        ),
        "string 1 of metadata key 'tokens' is not valid UTF-8",
    ),
    "duplicate_key": (GGUF(metadata=[ARCHITECTURE, ARCHITECTURE]), "'general.architecture' appears twice"),
    "value_type": (GGUF(metadata=[("key", struct.pack("<II", 13, 0))]), "unknown value type 13"),
    "value_type_huge": (GGUF(metadata=[("key", struct.pack("<II", 2**32 - 1, 0))]), "unknown value type"),
    "array_type": (GGUF(metadata=[("key", struct.pack("<IIQ", ARRAY, 77, 1))]), "unknown value type 77"),
    "array_of_arrays": (
        GGUF(metadata=[("key", struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(12))]),
        "array of arrays",
    ),
    "array_count": (GGUF(metadata=[("key", array(U8, [], count=HUGE))]), "'key' needs"),
    "array_count_wraps": (GGUF(metadata=[("key", array(F64, [0.0], count=2**61 + 1))]), "'key' needs"),
    "string_array_count": (GGUF(metadata=[("key", array(STRING, [], count=HUGE))]), "'key' needs"),
    "array_of_long_element": (GGUF(metadata=[("key", array(I64, [1], count=10**6))]), "'key' needs"),
    "string_length": (GGUF(metadata=[("key", struct.pack("<I", STRING) + text("a", HUGE))]), "'key' needs"),
    "string_length_max": (
        GGUF(metadata=[("key", struct.pack("<I", STRING) + text("a", U64_MAX))]),
        "'key' needs",
    ),
    "token_length": (
        GGUF(metadata=[("key", struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + text("b", 2**32))]),
        "'key' needs",
    ),
    "boolean": (GGUF(metadata=[("key", struct.pack("<IB", BOOL, 2))]), "boolean other than 0 and 1"),
    "boolean_array": (
        GGUF(metadata=[("key", struct.pack("<IIQ3B", ARRAY, BOOL, 3, 1, 0, 255))]),
        "boolean other than 0 and 1",
    ),
    "alignment_0": (GGUF(metadata=[("general.alignment", scalar(U32, 0))]), "is 0, not a power of two"),
    "alignment_3": (GGUF(metadata=[("general.alignment", scalar(U32, 3))]), "is 3, not a power of two"),
    "alignment_4": (GGUF(metadata=[("general.alignment", scalar(U32, 4))]), "is 4, not a power of two"),
    "alignment_48": (GGUF(metadata=[("general.alignment", scalar(U32, 48))]), "not a power of two"),
    "alignment_huge": (GGUF(metadata=[("general.alignment", scalar(U32, 2**31))]), "not a power of two"),
    "alignment_string": (GGUF(metadata=[("general.alignment", scalar(STRING, "32"))]), "has type 8"),
    "alignment_float": (GGUF(metadata=[("general.alignment", scalar(F32, 32.0))]), "has type 6"),
    "alignment_bool": (GGUF(metadata=[("general.alignment", scalar(BOOL, True))]), "has type 7"),
    "alignment_array": (GGUF(metadata=[("general.alignment", array(U32, [32]))]), "has type 9"),
    "tensor_name_length": (GGUF(tensors=[Tensor(name_length=HUGE)]), "the name of tensor 0 needs"),
    "duplicate_tensor": (
        GGUF(tensors=[Tensor(), Tensor(offset=256)], data=bytes(512)),
        "'weight' is listed twice",
    ),
    "num_dims_0": (GGUF(tensors=[Tensor(num_dims=0)]), "has 0 dimensions"),
    "num_dims_5": (GGUF(tensors=[Tensor(dims=(32, 1, 1, 1, 1))]), "has 5 dimensions"),
    "num_dims_huge": (GGUF(tensors=[Tensor(num_dims=2**32 - 1)]), "has 4294967295 dimensions"),
    "dimension_0": (GGUF(tensors=[Tensor(dims=(32, 0))]), "has a dimension of 0"),
    "dimensions_wrap": (GGUF(tensors=[Tensor(dims=(2**32, 2**32))]), "past the end of the file"),
    "dimensions_wrap_to_small": (GGUF(tensors=[Tensor(dims=(2**62 + 1, 4))]), "past the end of the file"),
    "negative_dimension": (GGUF(tensors=[Tensor(dims=(U64_MAX, 1))]), "past the end of the file"),
    "row_not_whole_blocks": (
        GGUF(tensors=[Tensor(dims=(33, 2), type_id=8)]),
        "33 elements is not a multiple",
    ),
    "type_iq3_s": (
        GGUF(tensors=[Tensor(dims=(256,), type_id=21)]),
        r"type IQ3_S \(21\); supported are F32, F16, BF16, Q8_0, .*Q6_K, IQ4_NL, IQ4_XS$",
    ),
    "type_removed": (GGUF(tensors=[Tensor(type_id=4)]), r"type unknown \(4\); supported are"),
    "type_huge": (GGUF(tensors=[Tensor(type_id=2**32 - 1)]), r"type unknown \(4294967295\)"),
    "offset_not_aligned": (GGUF(tensors=[Tensor(offset=16)]), "offset 16, not a multiple of 32"),
    "offset_outside": (GGUF(tensors=[Tensor(offset=256)]), "past the end of the file"),
    "offset_huge": (GGUF(tensors=[Tensor(offset=2**64 - 32)]), "past the end of the file"),
    "data_one_byte_short": (GGUF(data=bytes(255)), "has 256 bytes, past the end of the file"),
    "data_missing": (GGUF(data=b""), "past the end of the file"),
    "overlap": (
        GGUF(tensors=[Tensor("a"), Tensor("b", offset=224)], data=bytes(512)),
        "'b' overlaps tensor 'a'",
    ),
    "same_place": (GGUF(tensors=[Tensor("a"), Tensor("b")]), "overlaps tensor"),
    "inside_another": (
        GGUF(tensors=[Tensor("a", dims=(32, 4)), Tensor("b", dims=(8, 1), offset=64)], data=bytes(512)),
        "'b' overlaps tensor 'a'",
    ),
    "newlines_in_names": (GGUF(tensors=[Tensor("a\nb" * 50, type_id=99)]), r"tensor 'a\\nba\\nb"),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_one_clear_line(tmp_path, name):
    contents, message = LIES[name]
    path = write(tmp_path / "model.gguf", contents)
    open_before = len(os.listdir("/proc/self/fd"))
    start = time.process_time()
    with pytest.raises(WeightsError, match=message) as caught:
        GGUFFile(path)
    assert time.process_time() - start < 0.1
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_the_files_the_lies_are_told_about_are_valid(tmp_path):
    """So that each lie above is refused for its own sake."""
    two = GGUF(tensors=[Tensor("a"), Tensor("b", offset=256)], data=bytes(512))
    aligned = GGUF(metadata=[("general.alignment", scalar(U32, 64))], alignment=64)
    for contents in (GGUF(), two, aligned):
        assert_equal_to_reference(write(tmp_path / "model.gguf", contents))


@pytest.mark.parametrize("kind", ["folder", "missing", "pipe"])
def test_what_is_not_a_file_is_refused(tmp_path, kind):
    path = tmp_path / "model.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(WeightsError, match=r"model\.gguf: (cannot be opened|not a regular file)"):
        GGUFFile(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = tiny.tiny_llama_gguf(tmp_path / "whole.gguf", format_name="Q4_1").read_bytes()
    header_end = min(tensor.offset for tensor in GGUFFile(tmp_path / "whole.gguf").tensors.values())
    rng = np.random.default_rng(0)
    cuts = [*range(header_end), *rng.integers(header_end, len(whole), 200)]
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole)
    for cut in sorted(map(int, cuts), reverse=True):
        os.truncate(path, cut)
        with pytest.raises(WeightsError):
            GGUFFile(path)


def test_a_long_count_in_a_long_file_allocates_nothing(tmp_path):
    """A sparse file of 64 GiB: each length fits it, none may be believed."""
    lies = [
        GGUF(metadata=[("key", struct.pack("<I", STRING) + text("a", 2**35))]),
        GGUF(metadata=[("key", array(U8, [], count=2**35))]),
        GGUF(metadata=[("key", array(STRING, [], count=2**32))]),
        GGUF(tensor_count=2**30),
        GGUF(key_count=2**31),
    ]
    for contents in lies:
        path = write(tmp_path / "model.gguf", contents)
        os.truncate(path, 2**36)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        with pytest.raises(WeightsError, match=r"header longer|at most"):
            GGUFFile(path)
        assert time.process_time() - start < 0.5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_views_are_read_only_and_outlive_the_file(tmp_path):
    path = tiny.tiny_llama_gguf(tmp_path / "model.gguf")
    with GGUFFile(path) as file:
        view = file.data("output_norm.weight")
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(KeyError):
            file.data("nothing")
        file.release("output_norm.weight")
        copy = bytes(view)
    assert bytes(view) == copy
    with pytest.raises(WeightsError, match="already closed"):
        file.data("output_norm.weight")
    file.close()


def test_a_file_cut_after_opening_is_an_error_and_no_crash(tmp_path):
    """Cutting the file under a map ends a process that touches it, so this runs in one of its own."""
    path = tiny.tiny_llama_gguf(tmp_path / "model.gguf")
    script = (
        "import os, sys\n"
        "from jinn.weights.gguf import GGUFFile\n"
        "file = GGUFFile(sys.argv[1])\n"
        "os.truncate(sys.argv[1], 100)\n"
        "try:\n"
        "    file.data('output_norm.weight').sum()\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)  # noqa: S603
    assert "was cut short after it was opened" in result.stdout


def test_type_names_agree_with_the_gguf_package():
    for type_id, name in GGML_TYPE_NAMES.items():
        assert gguf.GGMLQuantizationType(type_id).name == name
    for block_format in FORMATS:
        quant_type = gguf.GGMLQuantizationType[block_format.name]
        assert quant_type == block_format.ggml_id
        assert gguf.GGML_QUANT_SIZES[quant_type] == (block_format.block_elems, block_format.block_bytes)
