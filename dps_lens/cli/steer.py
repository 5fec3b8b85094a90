"""`dps-lens steer`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm.auto import tqdm

from dps_lens.cli.app import app
from dps_lens.cli.chat import chat as talk
from dps_lens.cli.checks import check_same_model
from dps_lens.cli.options import Device, Dtype, Model, Outputs, Positions, Users
from dps_lens.cli.requests import Lines, Request, read_requests

if TYPE_CHECKING:
    from dps_lens.steering.rules import Rule


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
    requests: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, each with 'prompt' or 'user' ('example'), and its own heads, gamma, alpha, do_sample, "
            "temperature, top_k, top_p, seed where they differ."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with the steered model.")] = False,
    users: Users = "probe",
    outputs: Outputs = None,
    max_users: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many users; 3 without --requests.")
    ] = None,
    model: Model = "smollm2-135m",
    positions: Annotated[Positions, typer.Option(help="Where the second branch lacks the heads.")] = (
        Positions.response
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    sample: Annotated[bool, typer.Option(help="Sample instead of greedy decoding.")] = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a batch.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(help="Write here instead of printing, and go on where it stopped; with --chat, add the answers."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Drop what --out holds.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Generate with DPS or another rule and write JSON lines: the plain and the steered text of each prompt."""
    import dps_lens as dps
    from dps_lens.errors import SteeringError
    from dps_lens.steering.rules import find_rule

    found = find_rule(rule)
    if found.vector:
        raise SteeringError("steer: vectors are made in Python: dps.generate(…, rule='vector', vectors=…)")
    if sum((prompt is not None, requests is not None, chat)) > 1:
        raise SteeringError("steer: give one of a text, --requests and --chat")
    own_heads = requests is not None and run is None
    if found.needs_heads and not own_heads and (run is None) == (heads is None):
        raise SteeringError("steer: give either --run, a folder of 'dps-lens score', or --heads L12H3,L4H0")
    if found.prompt and (prompt is not None or chat):
        raise SteeringError(f"steer: rule {rule!r} needs prompts with a profile; leave the text out to use --users")
    scores = dps.HeadScores.load(run) if run else None
    chosen = scores.top(k) if scores else dps.HeadSet.parse(heads or "")
    sampling = {"do_sample": sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    defaults = {"heads": str(chosen), "gamma": gamma, "alpha": alpha, **sampling}
    shared: dict[str, Any] = {"rule": rule, "positions": positions.value, "max_new_tokens": max_new_tokens}
    shared |= {"plausibility": plausibility, "max_shift": max_shift}
    asked = [] if chat else _asked(prompt, requests, users, outputs, max_users, defaults, found)
    if out is not None and force:
        out.unlink(missing_ok=True)
    about = {"model": model, "dtype": dtype, **shared}
    lines = Lines(None if chat else out, asked, about)
    if not chat and lines.done == len(asked):
        return
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    if scores:
        check_same_model("steer", scores, loaded_model)
    if chat:
        talk(loaded_model, {**shared, **defaults, "heads": chosen}, out)
        return
    bar = tqdm(total=len(asked), initial=lines.done, desc="steering", unit="prompt", disable=None if out else True)
    with bar:
        for start in range(lines.done, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            for request, written in zip(batch, _write(loaded_model, batch, found, shared), strict=True):
                lines.write(request, written)
                bar.update()


def _asked(
    prompt: str | None,
    requests: Path | None,
    users: str,
    outputs: Path | None,
    max_users: int | None,
    defaults: Mapping[str, Any],
    rule: "Rule",
) -> list[Request]:
    import dps_lens as dps

    if prompt is not None:
        return [Request({"prompt": prompt}, prompt, settings=defaults)]
    if requests is not None:
        return read_requests(requests, dps.load_users(users, outputs=outputs, max_users=max_users), defaults, rule)
    examples = [user.examples[-1] for user in dps.load_users(users, outputs=outputs, max_users=max_users or 3)]
    return [
        Request(
            {"user": example.user_id, "example": example.id, "reference": example.reference},
            example=example,
            settings=defaults,
        )
        for example in examples
    ]


def _write(model: Any, batch: Sequence[Request], rule: "Rule", shared: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Plain and steered text of each request, and how hard it was steered."""
    import dps_lens as dps

    prompts: list[Any] = [
        dps.build_prompt(model, one.example) if one.example else dps.chat_prompt(model, one.prompt or "")
        for one in batch
    ]
    without = None
    if rule.prompt:
        without = [dps.build_prompt(model, one.example, "none") for one in batch if one.example]
    each: dict[str, list[Any]] = {name: [one.settings[name] for one in batch] for name in batch[0].settings}
    each["heads"] = [dps.HeadSet.parse(names) for names in each["heads"]]
    plain_options = {name: shared[name] for name in ("positions", "max_new_tokens")}
    plain: Any = dps.generate(model, prompts, **each | {"gamma": 0.0}, **plain_options)
    steered: Any = dps.generate(model, prompts, without=without, **each, **shared)
    for index in range(len(batch)):
        kl = float(steered.kl[index].mean())
        yield {
            "plain": plain.texts[index],
            "steered": steered.texts[index],
            "kl": None if math.isnan(kl) else kl,
        }
