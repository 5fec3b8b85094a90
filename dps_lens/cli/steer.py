"""`dps-lens steer`."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model
from dps_lens.cli.options import Device, Dtype, MaxUsers, Model, Outputs, Positions, Users


@app.command()
def steer(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; without it the users' examples are used.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder of 'score', whose top heads are used.")] = None,
    heads: Annotated[str | None, typer.Option(help="Heads by name, such as L12H3,L4H0.")] = None,
    k: Annotated[int, typer.Option(help="Heads to take from a run.")] = 10,
    rule: Annotated[
        str, typer.Option(help="dps, dps-entropy, decore, cad, cos, dola, amplify, or stacked: dps+cad.")
    ] = "dps",
    gamma: Annotated[float, typer.Option(help="Strength of the heads; 0 is the model's own decoding.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="Strength of the profile, for cad and cos.")] = 0.5,
    plausibility: Annotated[
        float | None, typer.Option(help="Rule out tokens with p under this share of the largest.")
    ] = None,
    max_shift: Annotated[float | None, typer.Option(help="Cap on KL(steered || full) at every step, nats.")] = None,
    users: Users = "probe",
    outputs: Outputs = None,
    max_users: MaxUsers = 3,
    model: Model = "smollm2-135m",
    positions: Annotated[Positions, typer.Option(help="Where the second branch lacks the heads.")] = (
        Positions.response
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    sample: Annotated[bool, typer.Option(help="Sample instead of greedy decoding.")] = False,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Generate with DPS or another rule and print JSON lines: the plain and the steered text of each prompt."""
    import dps_lens as dps
    from dps_lens.errors import SteeringError
    from dps_lens.steering.rules import find_rule

    found = find_rule(rule)
    if found.needs_heads and (run is None) == (heads is None):
        raise SteeringError("steer: give either --run, a folder of 'dps-lens score', or --heads L12H3,L4H0")
    scores = dps.HeadScores.load(run) if run else None
    chosen = scores.top(k) if scores else dps.HeadSet.parse(heads or "")
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    if scores:
        check_same_model("steer", scores, loaded_model)
    without: list[Any] | None = None
    if prompt is not None:
        if found.prompt:
            raise SteeringError(f"steer: rule {rule!r} needs prompts with a profile; leave the text out to use --users")
        prompts: list[Any] = [dps.chat_prompt(loaded_model, prompt)]
        about: list[dict[str, str]] = [{"prompt": prompt}]
    else:
        examples = [user.examples[-1] for user in dps.load_users(users, outputs=outputs, max_users=max_users)]
        prompts = [dps.build_prompt(loaded_model, example) for example in examples]
        if found.prompt:
            without = [dps.build_prompt(loaded_model, example, "none") for example in examples]
        about = [
            {"user": example.user_id, "example": example.id, "reference": example.reference} for example in examples
        ]
    options: dict[str, Any] = {
        "positions": positions.value,
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    plain = dps.generate(loaded_model, prompts, heads=chosen, gamma=0.0, **options)
    steered = dps.generate(
        loaded_model,
        prompts,
        heads=chosen,
        rule=rule,
        gamma=gamma,
        alpha=alpha,
        without=without,
        plausibility=plausibility,
        max_shift=max_shift,
        **options,
    )
    settings = {"rule": rule, "gamma": gamma, "alpha": alpha, "heads": str(chosen)}
    texts = {"plain": plain.texts, "steered": steered.texts}
    for index, row in enumerate(about):
        kl = float(steered.kl[index].mean())
        line = row | {name: values[index] for name, values in texts.items()} | {"kl": None if math.isnan(kl) else kl}
        line |= settings
        typer.echo(json.dumps(line, ensure_ascii=False))
