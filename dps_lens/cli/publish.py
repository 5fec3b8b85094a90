"""`dps-lens publish`: a head atlas of a run."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import heads_of


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="Run folder of 'score' or 'find'.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the atlas.")],
    k: Annotated[int, typer.Option(min=1, help="Heads to list, of scores; a found set is listed whole.")] = 10,
    compare: Annotated[str | None, typer.Option(help="Another atlas, a folder or a name, to compare with.")] = None,
) -> None:
    """Write a run's heads, intervals and settings as an atlas, without any user's text or id."""
    import dps_lens as dps

    found = heads_of(run)
    atlas = found.publish(out) if isinstance(found, dps.FoundHeads) else found.publish(out, k=k)
    typer.echo(f"{atlas.summary()}\nit and heads.csv are in {out}")
    if compare:
        agreed = dps.compare_atlas(atlas, dps.load_atlas(compare))
        typer.echo(
            f"the first {agreed['k']} heads of {compare}: Jaccard {agreed['jaccard']:.2f}, by chance "
            f"{agreed['chance']:.2f}; rank correlation of all heads {agreed['spearman']:.2f}"
        )
        for name, (own, other) in agreed["differ"].items():
            typer.echo(f"  {name}: {own} here, {other} there")
