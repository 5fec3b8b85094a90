"""The command line's root, and what its commands say when they end early."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dps_lens.progress import QUIET
from dps_lens.version import __version__


class Command(TyperCommand):
    """A command that says, when it is interrupted, where its results are and how to go on."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(f"\n{left_off(ctx.params)}", err=True)
            raise typer.Exit(130) from None


def left_off(params: dict[str, Any]) -> str:
    """Where an interrupted command stands."""
    out = params.get("out")
    if out is None or not ((Path(out) / "run.json").is_file() or Path(f"{out}.run.json").is_file()):
        return "interrupted"
    again = shlex.join(argument for argument in sys.argv[1:] if argument != "--force")
    dropped = " (without --force, which would drop it)" if "--force" in sys.argv else ""
    return (
        f"interrupted; what is finished is in {out}; the same command goes on from there{dropped}:\n  dps-lens {again}"
    )


class App(typer.Typer):
    """An app whose commands are all of this kind."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        return super().command(name, **{"cls": Command} | options)


app = App(
    help="Find the attention heads that carry a user's preferences, prove that they do, and steer with them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Without boxes, whose columns cut the names of options short in a narrow terminal.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"dps-lens {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; before the command.")] = False,
) -> None:
    if quiet:
        os.environ[QUIET] = "1"
