"""`jinn`: one module per command. Modules import what is heavy only when their command runs."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jinn.cli import batch, bench, chat, conformance, convert, generate, inspect, models, plan, random, serve

ERROR_STATUS = 2


class Commands(TyperGroup):
    """Ends a command that raises for what the user gave with one line on standard error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            print(f"jinn: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(ERROR_STATUS) from None


app = typer.Typer(
    name="jinn",
    cls=Commands,
    help="Serve and run language models on hardware you own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from jinn import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def jinn(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


for command in (
    serve.serve,
    chat.chat,
    generate.generate,
    bench.bench,
    batch.batch,
    conformance.conformance,
    inspect.inspect,
    convert.convert,
    random.random,
    models.pull,
    models.list_,
    models.rm,
):
    app.command(command.__name__.rstrip("_"))(command)

app.add_typer(plan.app, name="plan")


def main() -> None:
    """The console script."""
    app()
