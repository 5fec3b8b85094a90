"""`dps-lens score`."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import with_discovery
from dps_lens.cli.engines import Cpus, Gpus, RayAddress, ShardOf, Workers, engine_of, load_for, say_shard
from dps_lens.cli.options import (
    Ablation,
    BatchSize,
    Contrast,
    Device,
    Discovery,
    Dtype,
    MaxUsers,
    Method,
    Model,
    Outputs,
    Positions,
    Users,
)
from dps_lens.cli.tables import print_top


@app.command()
def score(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    users: Users = "probe",
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    examples: Annotated[
        int | None, typer.Option(min=1, help="Newest discovery examples of each user; all by default.")
    ] = None,
    discovery: Annotated[
        Discovery, typer.Option(help="'labelled' uses the users' own questions (LaMP-1, LaMP-7); evaluate on others.")
    ] = Discovery.history,
    method: Annotated[Method, typer.Option(help="'screened' measures the likely heads, 'attribution' none.")] = (
        Method.exact
    ),
    contrast: Annotated[Contrast, typer.Option(help="What the profile is compared with.")] = Contrast.no_profile,
    ablation: Annotated[Ablation, typer.Option(help="What is done to a head.")] = Ablation.zero,
    positions: Annotated[Positions, typer.Option(help="Where it is done.")] = Positions.response,
    top: Annotated[int, typer.Option(help="Heads to print.")] = 10,
    seed: int = 0,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option(help="Drop what the run folder holds.")] = False,
    workers: Workers = None,
    ray: RayAddress = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0,
    shard: ShardOf = None,
) -> None:
    """Score every head on the discovery examples of users (PCS); resumes where it stopped."""
    import dps_lens as dps

    loaded = dps.load_users(users, outputs=outputs, max_users=max_users)
    if discovery is Discovery.history:
        loaded = with_discovery(loaded)
    with engine_of(workers, ray, cpus, gpus, shard) as engine:
        scores = dps.score_heads(
            load_for(engine, model, device, dtype),
            loaded,
            contrast=None if contrast is Contrast.none else contrast.value,
            ablation=ablation.value,
            positions=positions.value,
            method=method.value,
            discovery=discovery.value,
            max_examples=examples,
            seed=seed,
            batch_size=batch_size or "auto",
            out=out,
            force=force,
            engine=engine,
        )
    dps.plots.heatmap(scores).write_html(out / "heatmap.html", include_plotlyjs=True)
    print_top(scores, top)
    say_shard(shard, out)
    typer.echo(f"scores and heatmap.html are in {out}")
