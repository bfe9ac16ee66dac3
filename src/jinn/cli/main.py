"""`jinn`: one module per command. Modules import what is heavy only when their command runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

ERROR_STATUS = 2

# Module and function of `jinn.cli` by command; a module alone is an app with commands of its own.
COMMANDS = {
    "serve": ("serve", "serve"),
    "chat": ("chat", "chat"),
    "generate": ("generate", "generate"),
    "bench": ("bench", "bench"),
    "batch": ("batch", "batch"),
    "conformance": ("conformance", "conformance"),
    "inspect": ("inspect", "inspect"),
    "convert": ("convert", "convert"),
    "random": ("random", "random"),
    "pull": ("models", "pull"),
    "list": ("models", "list_"),
    "rm": ("models", "rm"),
    "plan": ("plan", None),
}


class Commands(TyperGroup):
    """Ends a command that raises for what the user gave with one line on standard error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            print(f"jinn: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(ERROR_STATUS) from None


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from jinn import __version__

        print(__version__)
        raise typer.Exit


def jinn(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def make_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """`jinn` with these of its commands."""
    app = typer.Typer(
        name="jinn",
        cls=Commands,
        help="Serve and run language models on hardware you own.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        callback=jinn,
    )
    for name in names:
        module_name, function_name = COMMANDS[name]
        module = import_module(f"jinn.cli.{module_name}")
        if function_name is None:
            app.add_typer(module.app, name=name)
        else:
            app.command(name)(getattr(module, function_name))
    return app


def main() -> None:
    """The console script."""
    named = [name for name in sys.argv[1:2] if name in COMMANDS]
    spawned = None
    if named == ["serve"] and "--help" not in sys.argv:
        from jinn.engine.spawn import spawn

        # It imports what it needs while the flags are read; unused, it ends with this process.
        with suppress(OSError):  # which the server tells, when it tries again
            spawned = spawn()
    make_app(named or COMMANDS)(obj=spawned)  # all of them take a twentieth of a second to make
