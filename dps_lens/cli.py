"""The command line: every command calls one public function."""

import json
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dps_lens.analysis import AblationCost
    from dps_lens.data import User
    from dps_lens.scores import HeadScores

app = typer.Typer(
    help="Find the attention heads that carry a user's preferences, prove that they do, and steer with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2-135m, a Hugging Face id, a folder or a .gguf file.")]
Users = Annotated[
    str, typer.Option("--users", "-u", help="'probe', a LaMP questions file, LongLaMP or document JSON lines.")
]
Outputs = Annotated[Path | None, typer.Option(help="LaMP outputs file, when it is not beside the questions.")]
MaxUsers = Annotated[int | None, typer.Option(min=1, help="Use the first so many users.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; by default the GPU when there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Branches a batch; chosen by device when not given.")]


class _Discovery(str, Enum):
    history = "history"
    labelled = "labelled"


class _Ablation(str, Enum):
    zero = "zero"
    mean = "mean"
    uniform = "uniform"


class _Method(str, Enum):
    exact = "exact"
    screened = "screened"
    attribution = "attribution"


class _Positions(str, Enum):
    response = "response"
    all = "all"
    profile = "profile"


class _Contrast(str, Enum):
    no_profile = "no_profile"
    other_user = "other_user"
    none = "none"


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
        _Discovery, typer.Option(help="'labelled' uses the users' own questions (LaMP-1, LaMP-7); evaluate on others.")
    ] = _Discovery.history,
    method: Annotated[_Method, typer.Option(help="'screened' measures the likely heads, 'attribution' none.")] = (
        _Method.exact
    ),
    contrast: Annotated[_Contrast, typer.Option(help="What the profile is compared with.")] = _Contrast.no_profile,
    ablation: Annotated[_Ablation, typer.Option(help="What is done to a head.")] = _Ablation.zero,
    positions: Annotated[_Positions, typer.Option(help="Where it is done.")] = _Positions.response,
    top: Annotated[int, typer.Option(help="Heads to print.")] = 10,
    seed: int = 0,
    batch_size: BatchSize = None,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option(help="Drop what the run folder holds.")] = False,
) -> None:
    """Score every head on the discovery examples of users (PCS); resumes where it stopped."""
    import dps_lens as dps

    loaded = dps.load_users(users, outputs=outputs, max_users=max_users)
    if discovery is _Discovery.history:
        loaded = _with_discovery(loaded)
    scores = dps.score_heads(
        dps.load_model(model, device=device, dtype=dtype),
        loaded,
        contrast=None if contrast is _Contrast.none else contrast.value,
        ablation=ablation.value,
        positions=positions.value,
        method=method.value,
        discovery=discovery.value,
        max_examples=examples,
        seed=seed,
        batch_size=batch_size or "auto",
        out=out,
        force=force,
    )
    dps.plots.heatmap(scores).write_html(out / "heatmap.html", include_plotlyjs=True)
    _print_top(scores, top)
    typer.echo(f"scores and heatmap.html are in {out}")


@app.command()
def steer(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; without it the users' examples are used.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder of 'score', whose top heads are used.")] = None,
    heads: Annotated[str | None, typer.Option(help="Heads by name, such as L12H3,L4H0.")] = None,
    k: Annotated[int, typer.Option(help="Heads to take from a run.")] = 10,
    gamma: Annotated[float, typer.Option(help="Strength; 0 is the model's own decoding.")] = 1.0,
    users: Users = "probe",
    outputs: Outputs = None,
    max_users: MaxUsers = 3,
    model: Model = "smollm2-135m",
    positions: Annotated[_Positions, typer.Option(help="Where the second branch lacks the heads.")] = (
        _Positions.response
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    sample: Annotated[bool, typer.Option(help="Sample instead of greedy decoding.")] = False,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Generate with DPS and print JSON lines: the plain and the steered text of each prompt."""
    import dps_lens as dps
    from dps_lens.errors import SteeringError

    if (run is None) == (heads is None):
        raise SteeringError("steer: give either --run, a folder of 'dps-lens score', or --heads L12H3,L4H0")
    scores = dps.HeadScores.load(run) if run else None
    chosen = scores.top(k) if scores else dps.HeadSet.parse(heads or "")
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    if scores:
        _check_same_model(scores, loaded_model)
    if prompt is not None:
        prompts: list[Any] = [dps.chat_prompt(loaded_model, prompt)]
        about: list[dict[str, str]] = [{"prompt": prompt}]
    else:
        examples = [user.examples[-1] for user in dps.load_users(users, outputs=outputs, max_users=max_users)]
        prompts = [dps.build_prompt(loaded_model, example) for example in examples]
        about = [
            {"user": example.user_id, "example": example.id, "reference": example.reference} for example in examples
        ]
    texts = {}
    for name, strength in (("plain", 0.0), ("steered", gamma)):
        texts[name] = dps.generate(
            loaded_model,
            prompts,
            heads=chosen,
            gamma=strength,
            positions=positions.value,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        ).texts
    for index, row in enumerate(about):
        line = row | {name: values[index] for name, values in texts.items()} | {"gamma": gamma, "heads": str(chosen)}
        typer.echo(json.dumps(line, ensure_ascii=False))


@app.command()
def demo(
    users: Users = "probe",
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report and the scores go.")] = Path("runs/demo"),
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    max_users: Annotated[int, typer.Option(min=1, help="Use the first so many users.")] = 12,
    examples: Annotated[int, typer.Option(min=1, help="Discovery examples a user.")] = 2,
    held_out: Annotated[int, typer.Option(min=1, help="Evaluation examples a user.")] = 2,
    k: Annotated[int, typer.Option(min=1, help="Heads to test and to steer with.")] = 10,
    n_random: Annotated[int, typer.Option(min=1, help="Layer-matched random sets to compare with.")] = 20,
    gamma: Annotated[float, typer.Option(help="Steering strength.")] = 1.0,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option(help="Drop what the folder holds.")] = False,
) -> None:
    """Find heads, test them on held-out examples, steer with them, and write report.html."""
    import dps_lens as dps
    from dps_lens.errors import HeadError

    started = time.monotonic()
    loaded = _with_discovery(dps.load_users(users, outputs=outputs, max_users=max_users))
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    total = loaded_model.cfg.n_layers * loaded_model.cfg.n_heads
    if 2 * k > total:
        raise HeadError(f"demo: {k} heads and as many random ones are more than the model's {total}; use a smaller --k")
    _print_estimate(loaded_model, loaded, examples, held_out, n_random)
    scores = dps.score_heads(loaded_model, loaded, max_examples=examples, out=out, force=force)
    cost = dps.ablation_cost(loaded_model, loaded, scores, k=k, n_random=n_random, max_examples=held_out)
    texts = _steered_texts(loaded_model, loaded, cost, gamma)
    report = dps.plots.write_report(
        out / "report.html", scores, cost, texts, steering=f"DPS, γ = {gamma:g}, with the top {k} heads"
    )
    _print_top(scores, k)
    _print_cost(cost)
    typer.echo(f"report: {report}  ({time.monotonic() - started:.0f} s)")


def _with_discovery(users: "list[User]") -> "list[User]":
    """The users with at least one discovery example; says who is left out."""
    from dps_lens.errors import DataError

    kept = [user for user in users if user.discovery_examples()]
    for user in users:
        if user not in kept:
            typer.echo(f"left out: user {user.id} has too short a history to find heads on", err=True)
    if not kept:
        raise DataError("no user has a history long enough to find heads on (more than 3 documents when dated)")
    return kept


def _check_same_model(scores: "HeadScores", model: Any) -> None:
    from dps_lens.errors import SteeringError
    from dps_lens.model import describe_model

    found, wanted = describe_model(model), scores.manifest.get("model", {})
    if (found["name"], found["n_layers"], found["n_heads"]) != tuple(
        wanted.get(key) for key in ("name", "n_layers", "n_heads")
    ):
        raise SteeringError(
            f"steer: the run scored {wanted.get('name')!r}, loaded is {found['name']!r}; give its --model"
        )


def _print_estimate(model: Any, users: "list[User]", examples: int, held_out: int, n_random: int) -> None:
    """Time a sample of branches, equally from every layer, and say how long the whole will take."""
    from dps_lens.data import build_prompt
    from dps_lens.model import Runner
    from dps_lens.scoring import Branches, single_heads

    n_heads = model.cfg.n_heads
    prompt = build_prompt(model, users[0].discovery_examples()[-1])
    sample = single_heads(model.cfg.n_layers, n_heads)[::n_heads]
    for _ in range(2):  # the first round warms up
        begun = time.monotonic()
        branches = Branches(Runner.of(model), prompt)
        middle = time.monotonic()
        branches.ablated(sample)
    clean, sweep = middle - begun, (time.monotonic() - middle) * n_heads
    per_set = 2 * sweep / (model.cfg.n_layers * n_heads)  # a set may start at the first layer, a head starts halfway
    seconds = 2 * len(users) * (examples * (clean + sweep) + held_out * (clean + per_set * (n_random + 1)))
    size = f"{len(users)} users, {model.cfg.n_layers} layers × {n_heads} heads"
    typer.echo(f"{size}: about {max(seconds / 60, 0.1):.1f} minutes", err=True)


def _steered_texts(model: Any, users: "list[User]", cost: "AblationCost", gamma: float) -> list[dict[str, str]]:
    """The newest example of up to six users, spread over all of them, plain and steered."""
    import dps_lens as dps

    chosen = [user.examples[-1] for user in users[:: max(1, len(users) // 6)][:6]]
    prompts = [dps.build_prompt(model, example) for example in chosen]
    tokens = chosen[0].task.max_new_tokens
    plain, steered = (
        dps.generate(model, prompts, heads=cost.heads, gamma=strength, max_new_tokens=tokens).texts
        for strength in (0.0, gamma)
    )
    return [
        {"user": example.user_id, "reference": example.reference, "plain": before, "steered": after}
        for example, before, after in zip(chosen, plain, steered, strict=True)
    ]


def _print_top(scores: "HeadScores", k: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Top {k} heads (nats per token, 95% interval over {len(scores.users)} users)")
    for column in ("head", "score", "interval", *scores.components):
        table.add_column(column, justify="left" if column == "head" else "right")
    for row in scores.to_frame().head(k).to_dict("records"):
        parts = [f"{row[name]:.4f}" for name in scores.components]
        table.add_row(row["name"], f"{row['mean']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}", *parts)
    Console().print(table)


def _print_cost(cost: "AblationCost") -> None:
    from rich.console import Console
    from rich.table import Table

    from dps_lens.plots import verdict

    table = Table(title="Ablated on held-out examples (nats per token, 95% interval over users)")
    for column in ("ablated", "measure", "mean", "interval"):
        table.add_column(column, justify="left" if column in ("ablated", "measure") else "right")
    for row in cost.to_frame().to_dict("records"):
        table.add_row(row["ablated"], row["measure"], f"{row['mean']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}")
    console = Console()
    console.print(table)
    console.print(verdict(cost))


def main() -> None:
    """Run the command line; errors of dps_lens are one line, not a traceback."""
    from dps_lens.errors import DPSLensError

    try:
        app()
    except DPSLensError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho("interrupted; run the same command again to go on", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
