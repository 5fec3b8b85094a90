"""`dps-lens evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model
from dps_lens.cli.options import Device, Dtype
from dps_lens.cli.tables import print_evaluation

if TYPE_CHECKING:
    from dps_lens.cli.config import EvaluateConfig

_METHODS = "plain,rag,cad,dps,dps:random,stylevector"


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of the options below, such as 'held_out: 2'; what is given here as well wins."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder of 'score', for methods with Preference Heads.")] = None,
    users: Annotated[
        str | None, typer.Option("--users", "-u", help="'probe' (the default), or a file as in the other commands.")
    ] = None,
    outputs: Annotated[Path | None, typer.Option(help="LaMP outputs, when not beside the questions.")] = None,
    max_users: Annotated[int | None, typer.Option(min=1, help="Use the first so many users.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="plain, rag, prompt, cad, cos, dola, stylevector, steerx, rag+stylevector, rag+steerx, or RULE:FAMILY "
            f"such as dps:preference, dps:induction, decore:retrieval, dps:random. Default: {_METHODS}."
        ),
    ] = None,
    strengths: Annotated[str | None, typer.Option(help="Grid of γ and α (0.25,0.5,1).")] = None,
    ks: Annotated[str | None, typer.Option(help="Grid of numbers of heads (10).")] = None,
    layers: Annotated[str | None, typer.Option(help="Grid of a style vector's layers (a third, half, …).")] = None,
    choose_on: Annotated[int | None, typer.Option(min=0, help="Discovery examples a user that choose (1).")] = None,
    held_out: Annotated[int | None, typer.Option(min=1, help="Newest evaluation examples a user (all).")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="By default what the task needs.")] = None,
    baseline: Annotated[str | None, typer.Option(help="What the others are compared with (rag, or the first).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of folds and random heads (0).")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="As in the other commands.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option(help="Drop what the run folder holds.")] = False,
) -> None:
    """Compare ways to answer as the user would: metrics with intervals, settings chosen on discovery examples."""
    import dps_lens as dps
    from dps_lens.cli.config import read_config
    from dps_lens.files import write_text

    given = {
        "run": run, "users": users, "outputs": outputs, "max_users": max_users, "methods": methods,
        "strengths": strengths, "ks": ks, "layers": layers, "choose_on": choose_on, "held_out": held_out,
        "max_new_tokens": max_new_tokens, "baseline": baseline, "seed": seed, "model": model,
    }  # fmt: skip
    wanted = read_config(config, {name: value for name, value in given.items() if value is not None})
    loaded = dps.load_model(wanted.model, device=device, dtype=dtype)
    people = dps.load_users(wanted.users, outputs=wanted.outputs, max_users=wanted.max_users)
    found = dps.evaluate(
        loaded,
        people,
        _methods(wanted, loaded, [user.id for user in people]),
        strengths=wanted.strengths,
        ks=wanted.ks,
        layers=wanted.layers,
        choose_on=wanted.choose_on,
        max_examples=wanted.held_out,
        max_new_tokens=wanted.max_new_tokens,
        seed=wanted.seed,
        out=out,
        force=force,
    )
    found.save(out)
    found.rows.to_csv(out / "answers.csv", index=False)
    write_text(out / "config.yaml", wanted.as_yaml())
    print_evaluation(found, wanted.baseline or ("rag" if "rag" in found.methods else found.methods[0]))
    typer.echo(f"answers.csv, evaluation.json and config.yaml are in {out}")


def _methods(wanted: "EvaluateConfig", model: Any, users: list[str]) -> Mapping[str, Any]:
    """Methods by name; families are made where a method asks for them."""
    import dps_lens as dps
    from dps_lens.errors import EvaluationError
    from dps_lens.evaluation.methods import is_greedy_or_vector
    from dps_lens.families import draw_seed
    from dps_lens.steering.rules import find_rule

    made: dict[str, Any] = {}

    def family(method: str, name: str) -> Any:
        if name in made:
            return made[name]
        if name in ("preference", "random"):
            if wanted.run is None:
                raise EvaluationError(f"evaluate: method {method!r} needs the scores of 'dps-lens score'; give --run")
            made["preference"] = made.get("preference") or dps.HeadScores.load(wanted.run)
            check_same_model("evaluate", made["preference"], model)
            if name == "random":
                if len(wanted.ks) > 1:
                    raise EvaluationError("evaluate: random heads are matched to sets of one size; give one K")
                like = made["preference"].top(wanted.ks[0])
                draws = {user: draw_seed(wanted.seed, number) for number, user in enumerate(users)}
                made["random"] = {
                    user: dps.random_heads(model, like, match="nearest", seed=draw) for user, draw in draws.items()
                }
            return made[name]
        made.update(dps.reference_heads(model, [name]))
        return made[name]

    found: dict[str, Any] = {}
    for method in wanted.methods:
        rule, _, name = method.partition(":")
        found[method] = rule
        if not is_greedy_or_vector(rule) and find_rule(rule).needs_heads:
            found[method] = (rule, family(method, name or ("retrieval" if rule == "decore" else "preference")))
    return found
