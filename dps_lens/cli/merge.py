"""`dps-lens merge`."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="Run folders of all shards.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the whole run.")],
) -> None:
    """Put the run folders of shards together; folders of other settings are refused."""
    import dps_lens as dps

    count = dps.merge_runs(parts, out)
    typer.echo(f"{count} units are in {out}; the same command with --out {out} and without --shard gives the result")
