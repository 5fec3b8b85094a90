"""`dps-lens score`."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import ablation_of, objective_named, paired, template_kwargs, with_discovery
from dps_lens.cli.engines import Cpus, Gpus, RayAddress, ShardOf, Workers, engine_of, load_for, say_shard
from dps_lens.cli.options import (
    Ablation,
    Against,
    BatchSize,
    Device,
    Dtype,
    Force,
    MaxUsers,
    Model,
    Objective,
    Outputs,
    Pairs,
    ProfilePlace,
    Strict,
    TemplateKwargs,
    Users,
)
from dps_lens.cli.tables import print_top
from dps_lens.literals import Discovery, Positions, ScoreMethod


@app.command()
def score(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    users: Users = "probe",
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    strict: Strict = False,
    pairs: Pairs = None,
    chat_template_kwargs: TemplateKwargs = None,
    profile_in: ProfilePlace = "message",
    max_examples: Annotated[
        int | None, typer.Option(min=1, help="Newest discovery examples of each user; all by default.")
    ] = None,
    discovery: Annotated[
        Discovery, typer.Option(help="'labelled' uses the users' own questions (LaMP-1, LaMP-7); evaluate on others.")
    ] = "history",
    method: Annotated[
        ScoreMethod,
        typer.Option(
            help="'integrated' follows all heads along the path, 'exact' ablates one by one, 'screened' some."
        ),
    ] = "integrated",
    against: Against = "other_user",
    ablation: Ablation = "patch",
    objective: Objective = None,
    positions: Annotated[Positions, typer.Option(help="Where it is done.")] = "response",
    top: Annotated[int, typer.Option(help="Heads to print.")] = 10,
    seed: int = 0,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    workers: Workers = None,
    ray: RayAddress = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0,
    shard: ShardOf = None,
) -> None:
    """Score every head on the discovery examples of users; resumes where it stopped.

    The paper's PCS: --ablation zero --against none --method exact.
    """
    import dps_lens as dps
    from dps_lens.files import write_text

    loaded = paired(dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict), pairs)
    if discovery == "history":
        loaded = with_discovery("score", loaded, strict=strict)
    with engine_of(workers, ray, cpus, gpus, shard) as engine:
        scores = dps.score_heads(
            load_for(engine, model, device, dtype),
            loaded,
            ablation=ablation_of(ablation) or "patch",
            against=None if against == "none" else against,
            objective=objective_named(objective),
            positions=positions,
            method=method,
            max_examples=max_examples,
            prompt_config=dps.PromptConfig(
                chat_template_kwargs=template_kwargs(chat_template_kwargs), profile_in=profile_in
            ),
            score_config=dps.ScoreConfig(discovery=discovery, strict=strict),
            seed=seed,
            out=out,
            engine=engine,
            run_config=dps.RunConfig(force=force, batch_size=batch_size or "auto"),
        )
    write_text(out / "heatmap.html", scores.plot().to_html(include_plotlyjs=True))
    print_top(scores, top)
    say_shard(shard, out)
    typer.echo(f"scores and heatmap.html are in {out}")
