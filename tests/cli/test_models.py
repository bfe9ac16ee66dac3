from __future__ import annotations

import pytest

from jinn.weights import hub
from jinn.weights.errors import WeightsError
from jinn.weights.model_store import ModelFile, PulledModel, begin_pull, finish_pull, pull_lock
from jinn.weights.packed import PackedFile, packed_folder, packed_path


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("JINN_HOME", str(tmp_path / "home"))


def keep(name, path="model.gguf", data=b"x" * 1500):
    """Put a model into the store as a pull would."""
    model = PulledModel(name, "c0ffee" * 6, (ModelFile(path, len(data), "00"),))
    with pull_lock(name):
        begin_pull(name)
        model.path.write_bytes(data)
        finish_pull(model)
    return model


def test_list_and_rm(run, fail):
    assert run("list").stdout == ""
    keep("owner/b")
    keep("owner/a:model.gguf")
    lines = run("list").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["owner/a:model.gguf", "1.5", "kB", "c0ffeec0ffee"],
        ["owner/b", "1.5", "kB", "c0ffeec0ffee"],
    ]
    assert run("rm", "hf:owner/b").exit_code == 0
    assert [line.split()[0] for line in run("list").stdout.splitlines()] == ["owner/a:model.gguf"]
    assert "'hf:owner/b' is not pulled" in fail("rm", "hf:owner/b")


def test_packed_experts_are_counted_and_go_with_their_model(run, fail, tmp_path):
    pulled, own = keep("owner/a").path, tmp_path / "own.gguf"
    own.touch()
    for path in (pulled, own):
        sizes = {"experts": 5000}
        with PackedFile(packed_path(packed_folder(), path, sizes), "key", sizes) as file:
            file.seal("experts")
            file.finish()
    assert "packed experts take 24.6 kB in" in run("list").stderr
    assert run("rm", "owner/a").exit_code == 0
    assert run("rm", own).exit_code == 0
    assert own.exists()
    assert not list(packed_folder().glob("*.packed"))
    assert "no packed experts are kept" in fail("rm", own)


def test_pull_tells_what_it_got(run, monkeypatch):
    def pull(reference, progress):
        progress("model.gguf", 1500, 1500)
        return keep(reference.removeprefix("hf:"))

    monkeypatch.setattr(hub, "pull", pull)
    result = run("pull", "hf:owner/name")
    assert result.exit_code == 0
    assert result.stdout.split()[:4] == ["owner/name", "c0ffeec0ffee", "1.5", "kB"]


def test_pull_fails_in_one_line(fail, monkeypatch):
    def pull(reference, progress):
        raise WeightsError(f"{reference}: no such repository, or it needs HF_TOKEN to be set")

    monkeypatch.setattr(hub, "pull", pull)
    assert "hf:owner/name: no such repository" in fail("pull", "hf:owner/name")
    monkeypatch.undo()
    assert "is not hf:owner/name" in fail("pull", "hf:owner")
