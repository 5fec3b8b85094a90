"""`dps-lens vectors`, and vectors that other commands are given."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model, first_of, heads_of, template_kwargs, with_discovery
from dps_lens.cli.options import Device, Dtype, Force, MaxUsers, Model, Outputs, Strict, TemplateKwargs, Users
from dps_lens.literals import Recipe, VectorAgainst

if TYPE_CHECKING:
    from dps_lens.steering.vector import Vector

_MOST = 100
"""Users whose cosines are printed unasked."""

FromRun = Annotated[Path | None, typer.Option(help="Run folder of 'score' or 'find', whose first heads are used.")]


@app.command()
def vectors(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    run: FromRun = None,
    heads: Annotated[str | None, typer.Option(help="Heads by name, such as L12H3,L4H0.")] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Heads to take from a run; by default 10, of 'find' the whole set.")
    ] = None,
    users: Users = "probe",
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    strict: Strict = False,
    chat_template_kwargs: TemplateKwargs = None,
    against: Annotated[VectorAgainst, typer.Option(help="What the own texts are compared with.")] = "other_user",
    recipe: Annotated[
        Recipe, typer.Option(help="The difference of means, a probe's direction as in ITI, or a persona projection.")
    ] = "difference",
    max_examples: Annotated[int, typer.Option(min=1, help="Newest discovery examples of each user.")] = 4,
    n_donors: Annotated[int, typer.Option(min=1, help="Other users for each example, for other_user.")] = 2,
    seed: int = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Make a vector at each head for every user, from their discovery examples; resumes.

    Steer with them: dps-lens steer --rule head_vector --vectors OUT.
    """
    import dps_lens as dps
    from dps_lens.errors import SteeringError
    from dps_lens.files import write_text

    if (run is None) == (heads is None):
        raise SteeringError("vectors: give either --run, a folder of 'dps-lens score' or 'find', or --heads L12H3,L4H0")
    if k is not None and heads is not None:
        raise SteeringError("vectors: --k is of a --run; name as many --heads as you want")
    chosen = heads_of(run) if run else None
    loaded = with_discovery("vectors", dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict))
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    if chosen:
        check_same_model("vectors", chosen, loaded_model)
    made = dps.head_vectors(
        loaded_model,
        loaded,
        first_of(chosen, k) if chosen else dps.HeadSet.parse(heads or ""),
        against=against,
        recipe=recipe,
        max_examples=max_examples,
        n_donors=n_donors,
        prompt_config=dps.PromptConfig(chat_template_kwargs=template_kwargs(chat_template_kwargs)),
        seed=seed,
        out=out,
        run_config=dps.RunConfig(force=force),
    )
    write_text(out / "vectors.csv", made.to_frame().to_csv(index=False))
    typer.echo(f"{made.summary()}; they and vectors.csv are in {out}")
    if 1 < len(made) <= _MOST and recipe == "difference":
        cosines = made.cosines()
        mean = cosines[["cosine", "null_low", "null_high"]].mean()
        above = int((cosines["cosine"] > cosines["null_high"]).sum())
        typer.echo(
            f"cosine of two users' vectors: mean {mean['cosine']:.2f}, by chance {mean['null_low']:.2f} to "
            f"{mean['null_high']:.2f}; {above} of {len(cosines)} pairs lie above"
        )


def read_vectors(folder: Path) -> "Mapping[str, Vector] | Vector":
    """What a folder holds: vectors by user, or one.

    Raises:
        SteeringError: it holds none.
    """
    import dps_lens as dps
    from dps_lens.errors import SteeringError

    for kind in (dps.HeadVectors, dps.HeadVector, dps.SteeringVector):
        if (folder / f"{kind.stem}.json").is_file():
            return kind.load(folder)
    raise SteeringError(f"steer: {folder} holds no vectors; make them with 'dps-lens vectors', or vector.save(folder)")


def name_of(vectors: "Mapping[str, Vector] | Vector", asked: str | None, user: str | None) -> str | None:
    """Whose vector is added: as asked for, else the user's own, or what the one vector is called."""
    return asked or user if isinstance(vectors, Mapping) else asked or vectors.label


def vector_of(vectors: "Mapping[str, Vector] | Vector", user: str | None) -> "Vector":
    """The vector of a user, or the one that there is.

    Raises:
        SteeringError: it is not known whose is meant, or there is none.
    """
    from dps_lens.errors import SteeringError

    if not isinstance(vectors, Mapping):
        if user not in (None, vectors.label):
            raise SteeringError(f"steer: --vectors holds one vector, {vectors.label!r}, and none of user {user!r}")
        return vectors
    if user is None:
        raise SteeringError(f"steer: these are vectors of {len(vectors)} users; say whose with --vector-of USER")
    if user not in vectors:
        raise SteeringError(f"steer: user {user!r} has no vector; there are those of {', '.join(vectors)[:200]}")
    return vectors[user]
