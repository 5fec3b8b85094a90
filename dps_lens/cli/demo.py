"""`dps-lens demo`."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import with_discovery
from dps_lens.cli.options import Device, Dtype, Force, Model, Outputs, Users
from dps_lens.cli.report import SHOWN, paper_name
from dps_lens.cli.tables import print_cost, print_top

if TYPE_CHECKING:
    from dps_lens.data import User
    from dps_lens.model import HookedModel
    from dps_lens.scores import HeadScores


class Size(NamedTuple):
    """How much is measured."""

    examples: int
    held_out: int
    donors: int
    n_random: int
    gammas: tuple[float, ...]
    shown_users: int
    pcs: bool


# 19 random sets are the fewest of which a claim at 95% can be made.
_QUICK = Size(1, 1, 1, 19, (1.0, 2.0), 3, pcs=False)
_FULL = Size(2, 2, 2, 20, (0.5, 1.0, 2.0), SHOWN, pcs=True)
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
    from dps_lens.errors import HeadError
    from dps_lens.explorer.page import check_page

    report, folder = out / "report.html", out / "full" if full else out
    if not force:
        check_page(report)
    started = time.monotonic()
    usual = _FULL if full else _QUICK
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
    _print_estimate(loaded_model, loaded, size, folder)
    # A folder is made anew once, by the first call that uses it.
    anew, going_on = dps.RunConfig(force=force), dps.RunConfig()

    def scored(run_config: dps.RunConfig, engine: "dps.Shard | None" = None) -> "HeadScores":
        return dps.score_heads(
            loaded_model, loaded, against="other_user" if len(loaded) > 1 else "no_profile",
            max_examples=size.examples, score_config=dps.ScoreConfig(n_donors=size.donors), out=folder, engine=engine,
            run_config=run_config,
        )  # fmt: skip

    def write(scores: "HeadScores | dict[str, HeadScores]", note: str, **more: Any) -> None:
        found = dps.explore(loaded_model, loaded, scores, k=k, **{"max_users": 0, **more})
        replace(found, note=note).write(report, force=force)
        typer.echo(f"{report}, {time.monotonic() - started:.0f} s: {note or 'everything'}", err=True)

    # What is there already is not replaced by less.
    in_parts = not full and len(loaded) > _PARTS and (force or not (folder / f"{dps.HeadScores.stem}.json").exists())
    if in_parts:
        some = scored(anew, dps.Shard(1, _PARTS))
        write(some, f"{len(some.users)} of {len(loaded)} users so far; nothing is tested yet.")
    scores = scored(going_on if in_parts else anew)
    if in_parts:
        write(scores, "All users; the heads are not tested yet.")
    cost = dps.ablation_cost(
        loaded_model, loaded, scores, k=k, n_random=size.n_random, max_examples=size.held_out,
        out=folder / "ablation", run_config=anew,
    )  # fmt: skip
    if in_parts:
        write(scores, "The heads are tested; texts are on their way.", cost=cost)
    shown: HeadScores | dict[str, HeadScores] = scores
    if size.pcs:
        # Beside the default score, the paper's own, and those of pairs.
        pcs = dps.score_heads(
            loaded_model, loaded, ablation="zero", against=None, method="screened", max_examples=size.examples,
            out=folder / "pcs", run_config=anew,
        )  # fmt: skip
        shown = {"scores": scores, paper_name(pcs): pcs, **_by_pairs(loaded_model, loaded, size, folder)}
    write(
        shown, "", cost=cost, gammas=size.gammas, ks=sorted({max(1, k // 2), k}),
        max_users=size.shown_users, out=folder / "page", run_config=anew,
    )  # fmt: skip
    print_top(scores, k)
    print_cost(cost)
    typer.echo(f"report: {report}  ({time.monotonic() - started:.0f} s)")


def _by_pairs(model: "HookedModel", users: "list[User]", size: Size, folder: Path) -> "dict[str, HeadScores]":
    """Maps of what tells a style apart, and a topic, where the users say which are theirs."""
    import dps_lens as dps
    from dps_lens.errors import DataError

    found = {}
    for name, same in (("styles", "topic"), ("topics", "style")):
        try:
            paired = dps.make_pairs(users, same=same)
        except DataError:  # no such labels, or nobody else who shares one
            continue
        found[f"{name}, by pairs"] = dps.score_heads(
            model, paired, objective="pair", max_examples=size.examples,
            score_config=dps.ScoreConfig(n_donors=size.donors), out=folder / name, run_config=dps.RunConfig(force=True),
        )  # fmt: skip
    return found


def _show(out: Path) -> None:
    """Open the page that comes with the package, or say where it is."""
    import webbrowser

    from dps_lens.explorer.render import showcase

    out.mkdir(parents=True, exist_ok=True)
    page = out / "shown.html"
    page.write_text(showcase(), encoding="utf-8")
    typer.echo(str(page))
    webbrowser.open(page.resolve().as_uri())


def _print_estimate(model: "HookedModel", users: "list[User]", size: Size, folder: Path) -> None:
    """Time a sample of what is run, sets of heads equally from every layer, and say how long the rest will take."""
    from dps_lens.data import build_prompt
    from dps_lens.model import runner_of
    from dps_lens.scoring import CleanRun, ScoreConfig, single_heads
    from dps_lens.scoring.paths import integrated

    n_layers, n_heads, config = model.cfg.n_layers, model.cfg.n_heads, ScoreConfig()
    prompt = build_prompt(model, users[0].discovery_examples()[-1])
    sample = single_heads(n_layers, n_heads)[::n_heads]
    for _ in range(2):  # the first round warms up
        times = [time.monotonic()]
        run = CleanRun(runner_of(model), prompt)
        times.append(time.monotonic())
        run.ablated(sample)
        times.append(time.monotonic())
        integrated(run, config.ig_steps)
        times.append(time.monotonic())
    clean, sweep, path = (after - before for before, after in pairwise(times))
    per_set = 2 * sweep / n_layers  # a set may start at the first layer, a head starts halfway
    n_exact = config.exact_layers * n_heads + config.confirm * n_layers * n_heads
    each = {
        folder: (size.examples, (2 + size.donors) * clean + (1 + size.donors) * path),
        # Own, none, another user's and neutral; two of them are also patched.
        folder / "ablation": (size.held_out, 4 * clean + 6 * per_set * (size.n_random + 1)),
        folder / "pcs": (size.examples if size.pcs else 0, 2 * clean + n_exact * sweep / n_layers),
    }
    seconds = sum(
        max(0, examples * len(users) - len([*(run_folder / "units").glob("*.safetensors")])) * an_example
        for run_folder, (examples, an_example) in each.items()
    )
    about = f"{len(users)} users, {n_layers} layers × {n_heads} heads"
    typer.echo(f"{about}: about {max(seconds / 60, 0.1):.1f} minutes", err=True)
