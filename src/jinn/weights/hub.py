"""Pulls models from the Hugging Face hub into the local store, every file at one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from jinn.weights.errors import WeightsError, quoted
from jinn.weights.model_store import (
    ModelFile,
    PulledModel,
    Reference,
    begin_pull,
    check_relative,
    files_dir,
    finish_pull,
    list_models,
    part_path,
    pull_lock,
    pulled_model,
    remove_model,
    resolve_model,
)

__all__ = ["PulledModel", "list_models", "pull", "remove_model", "resolve_model"]

# What a model folder needs of the repository's top level: weights, configs, tokenizer; no code, no pickles.
FOLDER_PATTERNS = ("model*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja")

Progress = Callable[[str, int, int], None]  # file name, bytes so far, bytes in all; over all files


def pull(reference: str, progress: Progress | None = None) -> PulledModel:
    """Download `hf:owner/name[:file][@revision]` or an alias, going on where an earlier pull stopped.

    `progress` is called with (file name, bytes so far, bytes in all). Raises WeightsError.
    """
    wanted = Reference.parse(reference)
    with _hub_errors(reference):
        commit, remote_files = _remote_files(wanted)
        with pull_lock(wanted.name):
            model = pulled_model(wanted.name)
            if model is not None and model.revision == commit:
                return model
            begin_pull(wanted.name)
            counter = _ByteCounter(progress, sum(file.size for file in remote_files))
            files = tuple(_fetch(wanted, commit, file, counter) for file in remote_files)
            model = PulledModel(wanted.name, commit, files)
            finish_pull(model)
            return model


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    path: str
    size: int
    sha256: str | None  # the hub knows it of large files only


def _remote_files(wanted: Reference) -> tuple[str, list[_RemoteFile]]:
    """The commit that the reference means now, and the files to fetch."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    if not info.sha:
        raise WeightsError(f"hf:{wanted.repo}: the hub named no commit")
    paths = _choose_files(wanted, list(siblings))
    return info.sha, [_remote_file(siblings[path]) for path in paths]


def _remote_file(sibling: Any) -> _RemoteFile:
    check_relative(sibling.rfilename)
    return _RemoteFile(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None)


def _choose_files(wanted: Reference, paths: list[str]) -> list[str]:
    """The file that was named; or the folder's files where it has safetensors; or its only GGUF."""
    if wanted.file is not None:
        if wanted.file not in paths or not wanted.file.endswith(".gguf"):
            raise WeightsError(
                f"hf:{wanted.repo} has no GGUF file {quoted(wanted.file)}{_gguf_hint(wanted, paths)}"
            )
        return [wanted.file]
    folder_files = [
        path
        for path in paths
        if "/" not in path and any(fnmatchcase(path, pattern) for pattern in FOLDER_PATTERNS)
    ]
    if "config.json" in folder_files and any(path.endswith(".safetensors") for path in folder_files):
        return sorted(folder_files)
    ggufs = [path for path in paths if path.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    raise WeightsError(
        f"hf:{wanted.repo} is neither a safetensors folder nor one GGUF{_gguf_hint(wanted, paths)}"
    )


def _gguf_hint(wanted: Reference, paths: list[str]) -> str:
    ggufs = sorted(path for path in paths if path.endswith(".gguf"))
    return f"; name one of {', '.join(ggufs)} as hf:{wanted.repo}:FILE" if ggufs else ""


class _ByteCounter:
    """Adds up what all downloads report."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def start(self, file: _RemoteFile) -> None:
        self._file, self._file_start = file, self._done
        self._report()

    def add(self, num_bytes: float) -> None:
        self._done = min(self._done + int(num_bytes), self._file_start + self._file.size)
        self._report()

    def finish(self) -> None:
        self._done = self._file_start + self._file.size
        self._report()

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._file.path, self._done, self._total)


def _fetch(wanted: Reference, commit: str, file: _RemoteFile, counter: _ByteCounter) -> ModelFile:
    """Bring one file into the model's folder, whole and verified."""
    counter.start(file)
    target = files_dir(wanted.name) / file.path
    if file.sha256 is None or not target.is_file() or _sha256(target) != file.sha256:
        part = part_path(wanted.name, f"{commit}/{file.path}")
        _download(wanted.repo, commit, file, part, counter)
        _verify(part, file)
        target.parent.mkdir(parents=True, exist_ok=True)
        part.replace(target)
    counter.finish()
    return ModelFile(file.path, file.size, file.sha256 or _sha256(target))


def _download(repo: str, commit: str, file: _RemoteFile, part: Path, counter: _ByteCounter) -> None:
    """Append what is missing to `part`; hf_hub_download itself begins anew each time it is called."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with part.open("ab") as output:
        if output.tell() > file.size:
            output.truncate(0)
        http_get(
            hf_hub_url(repo, file.path, revision=commit),
            output,
            resume_size=output.tell(),
            headers=build_hf_headers(),
            expected_size=file.size,
            tqdm_class=_progress_bar(counter),
        )


def _verify(part: Path, file: _RemoteFile) -> None:
    """Delete a download that is not what the hub announced, and raise WeightsError."""
    size, sha256 = part.stat().st_size, _sha256(part)
    if size != file.size or sha256 != (file.sha256 or sha256):
        part.unlink()
        found = f"{size} of {file.size} bytes, SHA-256 {sha256}"
        raise WeightsError(f"{quoted(file.path)} arrived damaged ({found}); pull again")


def _sha256(path: Path) -> str:
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _progress_bar(counter: _ByteCounter) -> type[Any]:
    """A tqdm class, as huggingface_hub wants one, that draws nothing and feeds the counter."""
    from huggingface_hub.utils.tqdm import tqdm

    class CountingBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            counter.add(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            counter.add(n or 0)
            return None

    return CountingBar


@contextmanager
def _hub_errors(reference: str) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into one line."""
    from huggingface_hub import errors

    # The base of network errors comes from whichever HTTP library this version of huggingface_hub uses.
    network_errors: tuple[Any, ...] = (*errors.HfHubHTTPError.__bases__, OSError)
    try:
        yield
    except errors.GatedRepoError:
        raise WeightsError(f"{reference}: needs its licence accepted on the hub, and HF_TOKEN set") from None
    except errors.RepositoryNotFoundError:
        raise WeightsError(f"{reference}: no such repository, or it needs HF_TOKEN to be set") from None
    except errors.RevisionNotFoundError:
        raise WeightsError(f"{reference}: no such revision") from None
    except errors.HFValidationError as error:
        raise WeightsError(f"{reference}: {error}") from None
    except network_errors as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(f"{reference}: the download stopped, pull again to go on: {reason}") from None
