"""The command line: every command calls one public function."""

import sys
import warnings

import typer

from dps_lens.cli import (
    ablate,
    answers,
    compare,
    demo,
    describe,
    evaluate,
    faithfulness,
    fetch,
    find,
    merge,
    profile,
    publish,
    report,
    score,
    serve,
    steer,
    vectors,
)
from dps_lens.cli.app import app

__all__ = [
    "ablate",
    "answers",
    "app",
    "compare",
    "demo",
    "describe",
    "evaluate",
    "faithfulness",
    "fetch",
    "find",
    "main",
    "merge",
    "profile",
    "publish",
    "report",
    "score",
    "serve",
    "steer",
    "vectors",
]


def main() -> None:
    """Run the command line; warnings, and errors of dps_lens and of the system's files, are one line."""
    from dps_lens.errors import DPSLensError

    usual, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        with warnings.catch_warnings():
            app()
    except DPSLensError as error:
        _stop(str(error))
    except OSError as error:
        about = f"{error.filename}: " if error.filename else ""
        _stop(
            f"{about}{error.strerror or error}; finished units are kept, run the same command again when it is mended"
        )
    except KeyboardInterrupt:
        typer.secho("interrupted", err=True)
        sys.exit(130)
    finally:
        warnings.formatwarning = usual


def _one_line(message: Warning | str, *about: object, **more: object) -> str:
    """A warning without the line of code that gave it."""
    return f"warning: {message}\n"


def _stop(text: str) -> None:
    from dps_lens.cli.tables import printable

    typer.secho(f"error: {printable(text)}", fg="red", err=True)
    sys.exit(2)
