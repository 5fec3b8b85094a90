"""`dps-lens demo`."""

import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import with_discovery
from dps_lens.cli.options import Device, Dtype, Force, Model, Outputs, Users
from dps_lens.cli.report import PAPER
from dps_lens.cli.tables import print_cost, print_top

if TYPE_CHECKING:
    from dps_lens.data import User
    from dps_lens.model import HookedModel


@app.command()
def demo(
    users: Users = "probe",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report and the scores go.")] = Path("runs/demo"),
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    max_users: Annotated[int, typer.Option(min=1, help="Use the first so many users.")] = 12,
    max_examples: Annotated[int, typer.Option(min=1, help="Discovery examples a user.")] = 2,
    held_out: Annotated[int, typer.Option(min=1, help="Evaluation examples a user.")] = 2,
    k: Annotated[int, typer.Option(min=1, help="Heads to test and to steer with.")] = 10,
    n_random: Annotated[int, typer.Option(min=1, help="Layer-matched random sets to compare with.")] = 20,
    gamma: Annotated[float, typer.Option(help="Steering strength; the page has half and twice of it, too.")] = 1.0,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Find heads, test them on held-out examples, steer with them, and write report.html."""
    import dps_lens as dps
    from dps_lens.errors import HeadError

    started = time.monotonic()
    loaded = with_discovery("demo", dps.load_users(users, outputs=outputs, max_users=max_users))
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    total = loaded_model.cfg.n_layers * loaded_model.cfg.n_heads
    if 2 * k > total:
        raise HeadError(f"demo: {k} heads and as many random ones are more than the model's {total}; use a smaller --k")
    _print_estimate(loaded_model, loaded, max_examples, held_out, n_random)
    run_config = dps.RunConfig(force=force)
    scores = dps.score_heads(
        loaded_model, loaded, against="other_user" if len(loaded) > 1 else "no_profile", max_examples=max_examples,
        out=out, run_config=run_config,
    )  # fmt: skip
    paper = dps.score_heads(
        loaded_model, loaded, ablation="zero", against=None, method="attribution", max_examples=max_examples,
        out=out / "pcs", run_config=run_config,
    )  # fmt: skip
    cost = dps.ablation_cost(
        loaded_model, loaded, scores, k=k, n_random=n_random, max_examples=held_out, out=out / "ablation",
        run_config=run_config,
    )  # fmt: skip
    exploration = dps.explore(
        loaded_model, loaded, {"scores": scores, PAPER: paper}, cost=cost, k=k,
        gammas=(gamma / 2, gamma, 2 * gamma), ks=sorted({max(1, k // 2), k}), out=out / "page", run_config=run_config,
    )  # fmt: skip
    report = exploration.write(out / "report.html")
    print_top(scores, k)
    print_cost(cost)
    typer.echo(f"report: {report}  ({time.monotonic() - started:.0f} s)")


def _print_estimate(model: "HookedModel", users: "list[User]", examples: int, held_out: int, n_random: int) -> None:
    """Time a sample of what is run, sets of heads equally from every layer, and say how long the whole will take."""
    from dps_lens.data import build_prompt
    from dps_lens.model import runner_of
    from dps_lens.scoring import CleanRun, ScoreConfig, single_heads
    from dps_lens.scoring.paths import integrated

    n_heads, config = model.cfg.n_heads, ScoreConfig()
    prompt = build_prompt(model, users[0].discovery_examples()[-1])
    sample = single_heads(model.cfg.n_layers, n_heads)[::n_heads]
    for _ in range(2):  # the first round warms up
        times = [time.monotonic()]
        run = CleanRun(runner_of(model), prompt)
        times.append(time.monotonic())
        run.ablated(sample)
        times.append(time.monotonic())
        integrated(run, config.ig_steps)
        times.append(time.monotonic())
    clean, sweep, path = (after - before for before, after in pairwise(times))
    per_set = 2 * sweep / model.cfg.n_layers  # a set may start at the first layer, a head starts halfway
    scored = (2 + config.n_donors) * clean + (1 + config.n_donors) * path
    tested = 4 * clean + 6 * per_set * (n_random + 1)  # own, none, another user's, neutral; two of them also patched
    seconds = len(users) * (examples * scored + held_out * tested)
    size = f"{len(users)} users, {model.cfg.n_layers} layers × {n_heads} heads"
    typer.echo(f"{size}: about {max(seconds / 60, 0.1):.1f} minutes", err=True)
