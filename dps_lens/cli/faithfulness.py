"""`dps-lens faithfulness`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model, families, heads_of, numbers, objective_named, paired, with_discovery
from dps_lens.cli.engines import Cpus, Gpus, RayAddress, ShardOf, Workers, engine_of, load_for, say_shard
from dps_lens.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Force,
    HeadsRun,
    HeldOutExamples,
    Kinds,
    MaxUsers,
    Model,
    Objective,
    Outputs,
    OwnHeads,
    Pairs,
    Strict,
    Users,
)
from dps_lens.cli.tables import print_faithfulness
from dps_lens.literals import Against


@app.command()
def faithfulness(
    run: HeadsRun,
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    users: Users = "probe",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    strict: Strict = False,
    pairs: Pairs = None,
    max_examples: HeldOutExamples = None,
    kinds: Kinds = "induction,retrieval,function_vector",
    sizes: Annotated[str | None, typer.Option(help="Shares of all heads; by default those of the benchmark.")] = None,
    n_random: Annotated[int, typer.Option(min=0, help="Random rankings, measured with every example.")] = 39,
    select: OwnHeads = "global",
    against: Annotated[Against, typer.Option(help="The run that patched heads take their z from.")] = "other_user",
    objective: Objective = None,
    seed: int = 0,
    model: Model = "smollm2-135m",
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
    """How much of the gain the top of each ranking keeps with all other heads patched (CPR, CMD); resumes."""
    import dps_lens as dps
    from dps_lens.files import write_text

    scores = heads_of(run)
    with engine_of(workers, ray, cpus, gpus, shard) as engine:
        loaded = load_for(engine, model, device, dtype)
        check_same_model("faithfulness", scores, loaded)
        ranked = {"preference": scores, **dps.reference_heads(loaded, families(kinds), engine=engine)}
        tested = paired(dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict), pairs)
        tested = with_discovery("faithfulness", tested, strict=strict) if select == "user" else tested
        options: dict[str, Any] = {"sizes": numbers("sizes", sizes, float)} if sizes is not None else {}
        curves = dps.faithfulness(
            loaded,
            tested,
            ranked,
            against=against,
            n_random=n_random,
            select={"preference": select},
            max_examples=max_examples,
            seed=seed,
            out=out,
            engine=engine,
            held_out_config=dps.HeldOutConfig(objective=objective_named(objective)),
            run_config=dps.RunConfig(force=force, batch_size=batch_size or "auto"),
            **options,
        )
    write_text(out / "faithfulness.csv", curves.to_frame().to_csv(index=False))
    write_text(out / "areas.csv", curves.areas().to_csv(index=False))
    write_text(out / "faithfulness.html", curves.plot().to_html(include_plotlyjs=True))
    print_faithfulness(curves)
    say_shard(shard, out)
    typer.echo(f"faithfulness.csv, areas.csv and faithfulness.html are in {out}")
