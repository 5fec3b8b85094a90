"""`dps-lens compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model, families, first_of, heads_of
from dps_lens.cli.options import Device, Dtype, Kinds, Model, Run
from dps_lens.cli.tables import print_overlap

if TYPE_CHECKING:
    import pandas


@app.command()
def compare(
    run: Run,
    kinds: Kinds = "induction,retrieval,function_vector",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the figures; RUN/compare by default.")
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(min=1, help="Heads of each family; 10 by default, for a run of 'find' as many as it found."),
    ] = None,
    n_null: Annotated[int, typer.Option(min=1, help="Layer-matched random sets for each pair.")] = 1000,
    exclude: Annotated[
        float | None,
        typer.Option(help="Drop this share of B's heads from A before A is compared with B, such as 0.02."),
    ] = None,
    seed: int = 0,
    model: Model = "smollm2-135m",
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Overlap of a run's heads with induction, retrieval and function-vector heads, and between its users."""
    import dps_lens as dps
    from dps_lens.errors import ScoreError
    from dps_lens.files import write_text

    heads = heads_of(run)
    ours = heads if isinstance(heads, dps.HeadScores) else first_of(heads, k)
    if exclude is not None and not isinstance(heads, dps.HeadScores):
        raise ScoreError("compare: --exclude is for rankings by scores, and 'find' gives a set; leave it out")
    size = k or (10 if isinstance(heads, dps.HeadScores) else len(heads.heads))
    loaded = dps.load_model(model, device=device, dtype=dtype)
    check_same_model("compare", heads, loaded)
    references = dps.reference_heads(loaded, families(kinds))
    for name, family in references.items():
        if not family.defined:
            typer.echo(f"left out: {name}: {family.manifest['reason']}", err=True)
    folder = out or run / "compare"
    between = dps.overlap(
        {"preference": ours, **{name: family for name, family in references.items() if family.defined}},
        k=size,
        n_null=n_null,
        exclude=exclude,
        seed=seed,
    )
    print_overlap(between, f"Top {size} heads of each family")
    write_text(folder / "families.html", between.plot().to_html(include_plotlyjs=True))
    write_text(folder / "families.csv", between.to_frame().to_csv(index=False))
    if isinstance(heads, dps.HeadScores) and len(heads.users) > 1:
        users = dps.overlap(heads, k=size, n_null=n_null, seed=seed)
        write_text(folder / "users.html", users.plot().to_html(include_plotlyjs=True))
        write_text(folder / "users.csv", users.to_frame().to_csv(index=False))
        typer.echo(_between_users(users.specificity, users.user_specific))
    typer.echo(f"figures and tables are in {folder}")


def _between_users(specificity: "pandas.DataFrame | None", user_specific: bool | None) -> str:
    if specificity is None:
        return "Between users: too few examples a user to say how far one user's own halves agree."
    rows = {row["measure"]: row for row in specificity.to_dict("records")}
    difference = rows["difference"]
    numbers = (
        f"halves of one user share {rows['within']['mean']:.2f} (Jaccard), of two users {rows['between']['mean']:.2f}; "
        f"difference {difference['mean']:.2f}, interval {difference['low']:.2f} to {difference['high']:.2f}"
    )
    claim = {True: "heads are user-specific", False: "no sign of user-specific heads", None: "too few users to tell"}
    return f"Between users: {claim[user_specific]} ({numbers})."
