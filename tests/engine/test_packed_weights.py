"""Weights in a file give the bytes of weights in memory, and the file is packed once."""

from __future__ import annotations

import os

import numpy as np
import pytest

from jinn import _native
from jinn.engine import loading
from jinn.engine.config import EngineConfig
from jinn.engine.loading import load_runner
from jinn.weights.errors import WeightsError
from models.gguf_models import gguf_of
from models.transformers_models import random_model
from native.programs import one_sequence


@pytest.fixture(scope="module", params=["gguf", "folder"])
def path(request, tmp_path_factory):
    """A tiny random mixture."""
    return saved("qwen3_moe", tmp_path_factory.mktemp("packed"), request.param)


def saved(family, folder, kind):
    random_model(f"{family} for llama.cpp").save_pretrained(folder / "hf")
    return folder / "hf" if kind == "folder" else gguf_of(folder / "hf", folder / "a.gguf", "Q4_0")


@pytest.fixture
def logits(path, tmp_path):
    """A function from settings to the logits of a few tokens, and the notes of loading."""
    return lambda **settings: logits_of(path, **settings)


def logits_of(path, **settings):
    config = EngineConfig(str(path), num_threads=1, cache_memory=2**24, block_size=16, **settings)
    runner, info = load_runner(config, lambda loaded, total: None)
    return runner.logits(one_sequence(range(3, 30))), info.notes


@pytest.mark.parametrize("kind", ["gguf", "folder"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_weights_of_other_families_in_a_file(family, kind, tmp_path, monkeypatch):
    """Llama's rows are reordered in a GGUF; DeepSeek has dense layers, experts and a matrix per head."""
    path = saved(family, tmp_path, kind)
    expected, _ = logits_of(path)
    logits_of(path, packed_cache=str(tmp_path))
    monkeypatch.setattr(_native, "pack", None)
    actual, _ = logits_of(path, packed_cache=str(tmp_path))
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_the_bytes_are_those_of_weights_in_memory(logits, tmp_path, monkeypatch):
    expected, notes = logits()
    assert not notes
    written, _ = logits(packed_cache=str(tmp_path))
    (file,) = tmp_path.glob("*.packed")
    version = file.stat().st_mtime_ns
    monkeypatch.setattr(_native, "pack_experts", None)
    monkeypatch.setattr(_native, "pack", None)
    mapped, _ = logits(packed_cache=str(tmp_path), verify=True)
    assert file.stat().st_mtime_ns == version
    for actual in (written, mapped):
        np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_a_packed_file_that_has_changed_is_refused_where_that_is_asked(logits, tmp_path):
    logits(packed_cache=str(tmp_path))
    (file,) = tmp_path.glob("*.packed")
    with file.open("r+b") as out:
        out.seek(-4096, os.SEEK_END)
        out.write(b"\xff")
    with pytest.raises(WeightsError, match="not as it was packed"):
        logits(packed_cache=str(tmp_path), verify=True)


def test_another_version_of_the_model_is_packed_anew(logits, path, tmp_path):
    logits(packed_cache=str(tmp_path))
    (file,) = tmp_path.glob("*.packed")
    before = file.stat().st_ino
    os.utime(path if path.is_file() else next(path.glob("*.safetensors")), ns=(1, 1))
    with file.open("rb"):  # as a server that runs has it, so that the inode is not used again
        logits(packed_cache=str(tmp_path))
        assert file.stat().st_ino != before
    assert list(tmp_path.glob("*.packed")) == [file]


def test_what_does_not_fit_into_memory_is_kept_in_a_file(logits, tmp_path, monkeypatch):
    expected, _ = logits()
    monkeypatch.setenv("JINN_HOME", str(tmp_path))
    monkeypatch.setattr(loading, "available_memory", lambda: 2**20)
    actual, (note,) = logits()
    assert "experts are read from" in note
    assert str(tmp_path / "packed") in note
    assert list((tmp_path / "packed").glob("*.packed"))
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_a_place_that_is_no_file_is_refused(tmp_path):
    short = tmp_path / "short"
    short.write_bytes(b"0" * 4096)
    nbytes = _native.packed_nbytes("F32", 3, 16, 8)
    assert nbytes == 3 * 16 * 8 * 4
    assert _native.map_experts((str(short), 0), "F32", 3, 16, 8).shape == (3, 16, 8)
    for place in ((str(short), 4096), (str(tmp_path / "none"), 0), (str(short), 1)):
        with pytest.raises(ValueError, match="cannot be mapped"):
            _native.map_experts(place, "F32", 3, 16, 8)
