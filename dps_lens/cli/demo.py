"""`dps-lens demo`."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import with_discovery
from dps_lens.cli.options import Device, Dtype, Force, Model, Outputs, Users
from dps_lens.cli.sizes import FULL, QUICK
from dps_lens.cli.tables import print_cost, print_found, print_top

_PARTS = 4
"""The first of so many parts of the users makes the first page."""


@app.command()
def demo(
    users: Users = "probe",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report and the scores go.")] = Path("runs/demo"),
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="More examples, controls, strengths, texts and maps; in OUT/full."),
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Open a finished page that comes with the package; computes nothing.")
    ] = False,
    max_users: Annotated[int, typer.Option(min=1, help="Use the first so many users.")] = 12,
    max_examples: Annotated[
        int | None, typer.Option(min=1, help="Discovery examples a user; by default 1, with --full 2.")
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Evaluation examples a user; by default 1, with --full 2.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Heads to test and to steer with.")] = 10,
    n_random: Annotated[
        int | None,
        typer.Option(min=1, help="Layer-matched random sets to compare with; by default 19, with --full 20."),
    ] = None,
    gamma: Annotated[float, typer.Option(help="Steering strength; the page has multiples of it, too.")] = 1.0,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Find heads, test them on held-out examples, steer with them, and write report.html.

    The page is there after the first users, and grows with every stage.
    """
    if show:
        _show(out)
        return
    import dps_lens as dps
    from dps_lens.cli.estimate import print_estimate
    from dps_lens.cli.stages import Stages
    from dps_lens.errors import HeadError
    from dps_lens.explorer.page import check_page

    report, folder = out / "report.html", out / "full" if full else out
    if not force:
        check_page(report)
    usual = FULL if full else QUICK
    size = usual._replace(
        examples=max_examples or usual.examples,
        held_out=held_out or usual.held_out,
        n_random=n_random or usual.n_random,
        gammas=tuple(gamma * one for one in usual.gammas),
    )
    loaded = with_discovery("demo", dps.load_users(users, outputs=outputs, max_users=max_users))
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    total = loaded_model.cfg.n_layers * loaded_model.cfg.n_heads
    if 2 * k > total:
        raise HeadError(f"demo: {k} heads and as many random ones are more than the model's {total}; use a smaller --k")
    stages = Stages(loaded_model, loaded, size, k, folder, report, force)
    # What is there already is not replaced by less.
    there = not force and stages.scored
    grows = not there and not full and len(loaded) > _PARTS
    # First of all, for it refuses a folder of other settings.
    scores = stages.scores(None if there else dps.Shard(1, min(_PARTS, len(loaded))))
    if grows:
        stages.write(scores, note=f"{len(scores.users)} of {len(loaded)} users so far; no set is found yet.")
    print_estimate(stages)
    if not there:
        scores = stages.scores(anew=False)
    if grows:
        stages.write(scores, note="All users; no set is found yet.")
    found = stages.found()
    if grows:
        stages.write(scores, found, note="The heads are not tested yet.")
    cost = stages.cost(scores, found)
    if grows:
        stages.write(scores, found, cost, note="The heads are tested; texts are on their way.")
    stages.write_all({"scores": scores, **stages.maps()} if size.maps else scores, found, cost)
    if found is None:
        print_top(scores, k)
    else:
        print_found(found)
    print_cost(cost)
    typer.echo(f"report: {report}  ({stages.seconds:.0f} s)")


def _show(out: Path) -> None:
    """Open the page that comes with the package, or say where it is."""
    import webbrowser

    from dps_lens.explorer.render import showcase

    out.mkdir(parents=True, exist_ok=True)
    page = out / "shown.html"
    page.write_text(showcase(), encoding="utf-8")
    typer.echo(str(page))
    webbrowser.open(page.resolve().as_uri())
