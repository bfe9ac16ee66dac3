"""`jinn pull`, `jinn list` and `jinn rm`: the models on this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jinn.cli.progress import progress_bar
from jinn.sizes import format_size

NameArgument = Annotated[str, typer.Argument(help="hf:owner/name[:file][@revision], or a short name.")]


def pull(name: NameArgument) -> None:
    """Download a model, going on where an earlier download stopped."""
    from jinn.weights.hub import pull as pull_model

    with progress_bar(name, is_bytes=True) as update:
        model = pull_model(name, lambda file, done, total: update(done, total))
    print(f"{model.name} {model.revision[:12]} {format_size(model.size)} {model.path}")


def list_() -> None:
    """List the models that were pulled, and what packed experts of mixtures take."""
    from jinn.weights.model_store import list_models
    from jinn.weights.packed import packed_folder

    models = list_models()
    width = max((len(model.name) for model in models), default=0)
    for model in models:
        print(f"{model.name:<{width}}  {format_size(model.size):>9}  {model.revision[:12]}")
    if not models:
        print("no models are pulled", file=sys.stderr)
    packed = sum(path.stat().st_size for path in packed_folder().glob("*.packed"))
    if packed:
        print(f"packed experts take {format_size(packed)} in {packed_folder()}", file=sys.stderr)


def rm(
    name: Annotated[
        str,
        typer.Argument(help="A model that was pulled, by its name, or the path of one that was not."),
    ],
) -> None:
    """Delete a model that was pulled, and the packed experts kept of any."""
    from jinn.weights.model_store import remove_model

    remove_model(name)
    print(f"{name} is removed")
