"""`dps-lens find`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import finder_of, objective_named, paired, template_kwargs, with_discovery
from dps_lens.cli.engines import Cpus, Gpus, RayAddress, Workers, engine_of, load_for
from dps_lens.cli.options import (
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
from dps_lens.cli.tables import print_found
from dps_lens.literals import MAX_NEUTRAL_COST, MAX_TASK_COST, Counterfactual, Discovery


@app.command()
def find(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    users: Users = "probe",
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    strict: Strict = False,
    pairs: Pairs = None,
    chat_template_kwargs: TemplateKwargs = None,
    profile_in: ProfilePlace = "message",
    k: Annotated[int, typer.Option(min=1, help="At most so many heads.")] = 10,
    method: Annotated[
        str,
        typer.Option(
            help="gates (fitted by gradient), rank (top of the integrated scores; the quickest), greedy (forward "
            "selection), conditional (effects given the others), or one of your own: file.py:Name."
        ),
    ] = "gates",
    against: Annotated[Counterfactual, typer.Option(help="What the own profile is patched from.")] = "other_user",
    max_task_cost: Annotated[
        float,
        typer.Option(help="Most that zeroing the set may cost without a profile, nats per token; inf for no bound."),
    ] = MAX_TASK_COST,
    max_neutral_cost: Annotated[float, typer.Option(help="The same on neutral text.")] = MAX_NEUTRAL_COST,
    max_examples: Annotated[
        int | None, typer.Option(min=1, help="Newest discovery examples of each user; all by default.")
    ] = None,
    discovery: Annotated[
        Discovery, typer.Option(help="'labelled' uses the users' own questions (LaMP-1, LaMP-7); evaluate on others.")
    ] = "history",
    n_donors: Annotated[int, typer.Option(min=1, help="Other users for each example.")] = 2,
    objective: Objective = None,
    n_bootstraps: Annotated[
        int | None, typer.Option(min=0, help="Resamples of users; by default as the method's cost allows.")
    ] = None,
    seed: int = 0,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    workers: Workers = None,
    ray: RayAddress = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0,
) -> None:
    """Find a set of heads that carries the users' profiles, under bounds on what it costs elsewhere; resumes.

    The tables show how many resamples of users choose each head, and what the set takes, brings back and costs.

    In-sample is of the examples that chose it; crossed tests each user with heads that others chose.
    """
    import dps_lens as dps
    from dps_lens.files import write_text

    loaded = paired(dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict), pairs)
    if discovery == "history":
        loaded = with_discovery("find", loaded, strict=strict)
    with engine_of(workers, ray, cpus, gpus, None) as engine:
        found = dps.find_heads(
            load_for(engine, model, device, dtype),
            loaded,
            k,
            method=finder_of(method),
            against=against,
            max_task_cost=None if math.isinf(max_task_cost) else max_task_cost,
            max_neutral_cost=None if math.isinf(max_neutral_cost) else max_neutral_cost,
            max_examples=max_examples,
            prompt_config=dps.PromptConfig(
                chat_template_kwargs=template_kwargs(chat_template_kwargs), profile_in=profile_in
            ),
            find_config=dps.FindConfig(
                discovery=discovery,
                n_donors=n_donors,
                n_bootstraps=n_bootstraps,
                strict=strict,
                objective=objective_named(objective),
            ),
            seed=seed,
            out=out,
            engine=engine,
            run_config=dps.RunConfig(force=force, batch_size=batch_size or "auto"),
        )
    write_text(out / "found.csv", found.to_frame().to_csv(index=False))
    print_found(found)
    typer.echo(f"the set and found.csv are in {out}")
