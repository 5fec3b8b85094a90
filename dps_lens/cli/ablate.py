"""`dps-lens ablate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import (
    ablation_of,
    check_same_model,
    families,
    heads_of,
    numbers,
    objective_named,
    only_of,
    paired,
    sizes_of,
    with_discovery,
)
from dps_lens.cli.engines import Cpus, Gpus, RayAddress, ShardOf, Workers, engine_of, load_for, say_shard
from dps_lens.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Force,
    HeldOutExamples,
    Kinds,
    MaxUsers,
    Model,
    Objective,
    Only,
    Outputs,
    OwnHeads,
    Pairs,
    Strict,
    Users,
)
from dps_lens.cli.tables import print_effects
from dps_lens.literals import Against

if TYPE_CHECKING:
    from dps_lens.selection import HeadSource


@app.command()
def ablate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    run: Annotated[
        Path | None, typer.Option("--run", help="Run folder of 'score' or 'find', whose first heads are tested.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="Instead of a run: heads by name, such as L12H3,L4H0.")] = None,
    users: Users = "probe",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    strict: Strict = False,
    only: Only = None,
    pairs: Pairs = None,
    max_examples: HeldOutExamples = None,
    kinds: Kinds = "induction,retrieval,function_vector",
    ks: Annotated[
        str | None,
        typer.Option(
            help="Sizes of the sets; by default 1,5,10,20, of 'find' up to what it was asked for, of --heads all."
        ),
    ] = None,
    n_random: Annotated[int, typer.Option(min=0, help="Layer-matched random sets of each family and size.")] = 50,
    select: OwnHeads = "global",
    ablation: Annotated[
        str | None, typer.Option(help="By default that of the scores, of --heads zero; or a name, or file.py:Name.")
    ] = None,
    objective: Objective = None,
    patch: Annotated[bool, typer.Option(help="Patch between two runs instead: necessity and sufficiency.")] = False,
    against: Annotated[Against, typer.Option(help="With --patch, the other run.")] = "no_profile",
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
    """Ablate the top heads of every family, or heads by name, on held-out examples, beside random heads; resumes."""
    import dps_lens as dps
    from dps_lens.errors import HeadError, ScoreError
    from dps_lens.files import write_text

    if (run is None) == (heads is None):
        raise ScoreError("ablate: give either --run, a folder of 'dps-lens score' or 'find', or --heads L12H3,L4H0")
    if heads is not None and select == "user":
        raise ScoreError("ablate: --select user chooses heads of a --run; --heads are those of all users")
    scores = heads_of(run) if run else None
    named = dps.HeadSet.parse(heads or "")
    if scores is None and not len(named):
        raise HeadError("ablate: --heads names none; write names such as L12H3,L4H0")
    tested = paired(dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict), pairs)
    tested = only_of("ablate", tested, only)
    tested = with_discovery("ablate", tested, strict=strict) if select == "user" else tested
    if ks is not None:
        sizes = numbers("ks", ks, int)
    else:
        sizes = sizes_of(scores, (1, 5, 10, 20)) if scores is not None else [len(named)]
    with engine_of(workers, ray, cpus, gpus, shard) as engine:
        loaded = load_for(engine, model, device, dtype)
        if scores is not None:
            check_same_model("ablate", scores, loaded)
        named.mask(loaded.cfg)  # refuses heads that the model has not
        references = dps.reference_heads(loaded, families(kinds), engine=engine) if kinds else {}
        sets: dict[str, HeadSource] = {"heads": named} if scores is None else {"preference": scores}
        sets |= references
        options: dict[str, Any] = {
            "ks": sizes,
            "n_random": n_random,
            "select": {"preference": select} if run else "global",
            "max_examples": max_examples,
            "seed": seed,
            "out": out,
            "engine": engine,
            "held_out_config": dps.HeldOutConfig(objective=objective_named(objective)),
            "run_config": dps.RunConfig(force=force, batch_size=batch_size or "auto"),
        }
        if patch:
            effects = dps.patch_heads(loaded, tested, sets, against=against, **options)
        else:
            effects = dps.ablation_curve(loaded, tested, sets, ablation=ablation_of(ablation), **options)
    write_text(out / "effects.csv", effects.to_frame().to_csv(index=False))
    write_text(out / "effects.html", effects.plot().to_html(include_plotlyjs=True))
    print_effects(effects)
    say_shard(shard, out)
    typer.echo(f"effects.csv and effects.html are in {out}")
