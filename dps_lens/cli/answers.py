"""`dps-lens answers`."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import paired, template_kwargs
from dps_lens.cli.options import (
    Device,
    Dtype,
    Force,
    HeldOutExamples,
    MaxUsers,
    Model,
    Outputs,
    Pairs,
    ProfilePlace,
    Strict,
    TemplateKwargs,
    Users,
)


@app.command()
def answers(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    users: Users = "probe",
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    strict: Strict = False,
    pairs: Pairs = None,
    chat_template_kwargs: TemplateKwargs = None,
    profile_in: ProfilePlace = "message",
    max_examples: HeldOutExamples = None,
    n_donors: Annotated[int, typer.Option(min=1, help="Other users for each example.")] = 2,
    per_token: Annotated[
        bool, typer.Option("--per-token/--summed", help="Compare means over tokens, or whole answers.")
    ] = True,
    seed: int = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """How often the model prefers the user's own answer: with the own profile, another user's, and none; resumes."""
    import dps_lens as dps
    from dps_lens.cli.tables import print_answers
    from dps_lens.files import write_text

    loaded = paired(dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict), pairs)
    ranks = dps.rank_answers(
        dps.load_model(model, device=device, dtype=dtype),
        loaded,
        n_donors=n_donors,
        max_examples=max_examples,
        prompt_config=dps.PromptConfig(
            chat_template_kwargs=template_kwargs(chat_template_kwargs), profile_in=profile_in
        ),
        seed=seed,
        out=out,
        run_config=dps.RunConfig(force=force),
    )
    frame = ranks.to_frame(per_token=per_token)
    write_text(out / "answers.csv", frame.to_csv(index=False))
    print_answers(frame, ranks.summary())
    typer.echo(f"answers.csv is in {out}")
