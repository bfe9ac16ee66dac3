"""`jinn random`: models of published shapes with random weights, for benchmarks and tests."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from jinn.cli.interrupt import exit_on_sigterm
from jinn.cli.options import TARGET_HELP, TYPE_HELP, ForceOption, ThreadsOption
from jinn.cli.progress import progress_bar
from jinn.sizes import format_size


def random(
    shape: Annotated[
        str | None, typer.Argument(metavar="SHAPE", help="A name that --list prints.", show_default=False)
    ] = None,
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="DST",
            help=TARGET_HELP,
            show_default=False,
        ),
    ] = None,
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help=TYPE_HELP,
            show_default="q4_0 in GGUF, bf16 in a folder",
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N layers.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="The same seed gives the same bytes.", min=0)] = 0,
    force: ForceOption = False,
    list_shapes: Annotated[bool, typer.Option("--list", help="Print the shapes that there are.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Write a model of a published shape with random weights and an untrained tokenizer.

    It runs like the real one, as fast and as large, and talks nonsense.
    """
    if list_shapes:
        print(format_shapes())
        return
    if shape is None or target is None:
        raise ValueError("random needs SHAPE and DST, or --list")
    from jinn import _native
    from jinn.models.presets import preset_config
    from jinn.weights.random_model import write_random

    start = time.monotonic()
    with exit_on_sigterm(), progress_bar(target.name, is_bytes=True) as update:
        size = write_random(
            shape,
            preset_config(shape, layers),
            target,
            type_name,
            seed=seed,
            overwrite=force,
            num_threads=threads or _native.default_num_threads(),
            progress=update,
        )
    seconds = time.monotonic() - start
    print(f"{target}: {shape}, seed {seed}, {format_size(size)} in {seconds:.1f} s")


def format_shapes() -> str:
    """A line for each shape: its name, layers and parameters."""
    from math import prod

    from jinn.models.presets import preset, preset_config, preset_names

    rows: list[tuple[str, ...]] = [("shape", "family", "layers", "parameters", "active")]
    for name in preset_names():
        model = preset(name)
        total = sum(prod(spec.shape) for spec in model.parameters().values())
        numbers = (preset_config(name)["num_hidden_layers"], total, model.active_parameters())
        rows.append((name, model.family, *(f"{number:,}" for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = "<<>>>"
    return "\n".join(
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths, strict=True))
        for row in rows
    )
