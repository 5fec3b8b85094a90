"""The command line: every command calls one public function."""

import sys

import typer

from dps_lens.cli import ablate, compare, demo, evaluate, fetch, merge, report, score, steer
from dps_lens.cli.app import app

__all__ = ["ablate", "app", "compare", "demo", "evaluate", "fetch", "main", "merge", "report", "score", "steer"]


def main() -> None:
    """Run the command line; errors of dps_lens are one line, not a traceback."""
    from dps_lens.errors import DPSLensError

    try:
        app()
    except DPSLensError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho("interrupted; run the same command again to go on", err=True)
        sys.exit(130)
