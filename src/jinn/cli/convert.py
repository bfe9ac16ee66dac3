"""`jinn convert`: a model in the other file format, or in a smaller type."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jinn.cli.interrupt import exit_on_sigterm
from jinn.cli.options import TARGET_HELP, TYPE_HELP, ForceOption, ThreadsOption
from jinn.cli.progress import progress_bar
from jinn.sizes import format_size

if TYPE_CHECKING:
    from jinn.weights.convert import Conversion
    from jinn.weights.converted_tensor import TensorReport

_MAX_ROWS = 12  # of the table on the screen; the report has all


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A .gguf file, a Hugging Face folder or a pulled name.")
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help=TARGET_HELP),
    ],
    type_name: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help=TYPE_HELP,
            show_default="as they are; bf16 where a folder cannot hold that",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write each tensor's error as JSON.", show_default=False),
    ] = None,
    force: ForceOption = False,
    threads: ThreadsOption = None,
) -> None:
    """Convert a model between GGUF and Hugging Face's folders, or quantise it.

    DST appears when it is complete; an interrupted run leaves nothing behind. Prints what quantising costs.
    """
    from jinn import _native
    from jinn.weights.convert import convert as convert_model
    from jinn.weights.hub import resolve_model

    path = resolve_model(source)
    with exit_on_sigterm(), progress_bar(f"{path.name} to {target.name}", is_bytes=True) as update:
        conversion = convert_model(
            path,
            target,
            type_name,
            overwrite=force,
            num_threads=threads or _native.default_num_threads(),
            progress=update,
        )
    if report is not None:
        report.write_text(json.dumps(describe(conversion), indent=2) + "\n", encoding="utf-8")
    print(format_conversion(conversion))


def describe(conversion: Conversion) -> dict[str, Any]:
    """The report as JSON has it."""
    return {
        "path": str(conversion.path),
        "bytes": conversion.num_bytes,
        "tensors": [asdict(tensor) for tensor in conversion.tensors],
        "left_out": list(conversion.left_out),
    }


def format_conversion(conversion: Conversion) -> str:
    """What was written, and the tensors that lost most."""
    lossy = [tensor for tensor in conversion.tensors if tensor.max_error > 0]
    worst = sorted(lossy, key=lambda tensor: -tensor.rms_error)
    lines = []
    if worst:
        width = max(len(tensor.name) for tensor in worst[:_MAX_ROWS])
        lines.append(f"{'tensor':<{width}}  {'type':<13}  relative RMS error  largest error")
        lines += [_row(tensor, width) for tensor in worst[:_MAX_ROWS]]
    if len(worst) > _MAX_ROWS:
        lines.append(f"and {len(worst) - _MAX_ROWS} more with less error (--report FILE has all)")
    if conversion.left_out:
        lines.append(
            f"left out: {len(conversion.left_out)} tensors of the multi-token prediction module, "
            "which GGUF has no place for in this family"
        )
    num_exact = len(conversion.tensors) - len(lossy)
    size = format_size(conversion.num_bytes)
    lines.append(f"{conversion.path}: {len(conversion.tensors)} tensors, {size}, {num_exact} of them exact")
    return "\n".join(lines)


def _row(tensor: TensorReport, width: int) -> str:
    types = f"{tensor.source_type} to {tensor.type}"
    return f"{tensor.name:<{width}}  {types:<13}  {tensor.rms_error:>18.2%}  {tensor.max_error:>13.2e}"
