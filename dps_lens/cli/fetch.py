"""`dps-lens fetch`."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="lamp-1 to lamp-7. LongLaMP comes by itself: --users longlamp/CONFIG.")],
    split: Annotated[str, typer.Option(help="dev or train.")] = "dev",
    to: Annotated[Path | None, typer.Option(help="Folder; the user's cache by default.")] = None,
    mirror: Annotated[str | None, typer.Option(help="Address with the folders of the official one.")] = None,
) -> None:
    """Download a LaMP task; goes on where an earlier download stopped. Then: --users lamp-4."""
    from dps_lens.data.fetch import LAMP
    from dps_lens.data.fetch import fetch as download

    typer.echo(download(name, split=split, to=to, mirror=mirror or LAMP))
