"""`dps-lens ablate`."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model, numbers, with_discovery, words
from dps_lens.cli.engines import Cpus, Gpus, RayAddress, ShardOf, Workers, engine_of, load_for, say_shard
from dps_lens.cli.options import BatchSize, Device, Dtype, Kinds, MaxUsers, Model, Outputs, Run, Select, Users
from dps_lens.cli.tables import print_effects


@app.command()
def ablate(
    run: Run,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    users: Users = "probe",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Newest evaluation examples of each user; all by default.")
    ] = None,
    kinds: Kinds = "induction,retrieval,function_vector",
    ks: Annotated[str, typer.Option(help="Sizes of the sets.")] = "1,5,10,20",
    n_random: Annotated[int, typer.Option(min=0, help="Layer-matched random sets of each family and size.")] = 50,
    select: Annotated[Select, typer.Option(help="Heads by other users, or each user's own.")] = Select.others,
    patch: Annotated[bool, typer.Option(help="Patch between runs with and without profile instead.")] = False,
    seed: int = 0,
    model: Model = "smollm2-135m",
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
    """Ablate the top heads of every family on held-out examples, beside random heads; resumes where it stopped."""
    import dps_lens as dps

    scores = dps.HeadScores.load(run)
    with engine_of(workers, ray, cpus, gpus, shard) as engine:
        loaded = load_for(engine, model, device, dtype)
        check_same_model("ablate", scores, loaded)
        families = {"preference": scores, **dps.reference_heads(loaded, words(kinds), engine=engine)}
        measure = dps.patch_heads if patch else dps.ablation_curve
        tested = dps.load_users(users, outputs=outputs, max_users=max_users)
        effects = measure(
            loaded,
            with_discovery(tested) if select is Select.own else tested,
            families,
            ks=numbers("ks", ks),
            n_random=n_random,
            select={"preference": "user" if select is Select.own else "global"},
            max_examples=held_out,
            seed=seed,
            batch_size=batch_size or "auto",
            out=out,
            force=force,
            engine=engine,
        )
    effects.to_frame().to_csv(out / "effects.csv", index=False)
    effects.plot().write_html(out / "effects.html", include_plotlyjs=True)
    print_effects(effects)
    say_shard(shard, out)
    typer.echo(f"effects.csv and effects.html are in {out}")
