"""`dps-lens evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model, families, paired, rule_of, template_kwargs, with_discovery
from dps_lens.cli.engines import Cpus, Gpus, RayAddress, ShardOf, Workers, engine_of, load_for, say_shard
from dps_lens.cli.options import METHODS, Device, Force, HeldOutExamples, Pairs, Strict, TemplateKwargs
from dps_lens.cli.tables import print_evaluation
from dps_lens.extensions import is_path, load_object

if TYPE_CHECKING:
    from dps_lens.cli.config import EvaluateConfig
    from dps_lens.data import PromptConfig, User
    from dps_lens.heads import HeadSet
    from dps_lens.model import HookedModel
    from dps_lens.scores import HeadScores
    from dps_lens.work import Engine


@app.command()
def evaluate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")],
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of the options below, such as 'max_examples: 2'; what is given here wins."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder of 'score', for methods with Preference Heads.")] = None,
    users: Annotated[
        str | None, typer.Option("--users", "-u", help="'probe' (the default), or a file as in the other commands.")
    ] = None,
    outputs: Annotated[Path | None, typer.Option(help="LaMP outputs, when not beside the questions.")] = None,
    max_users: Annotated[int | None, typer.Option(min=1, help="Use the first so many users.")] = None,
    strict: Strict = False,
    pairs: Pairs = None,
    chat_template_kwargs: TemplateKwargs = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="plain, rag, prompt, cad, cos, dola, stylevector, steerx, lora, rag+lora and the like, or RULE:FAMILY "
            "such as dps:preference, head_vector:induction, decore:retrieval, dps:random; a RULE may be file.py:Name. "
            f"Default: {','.join(METHODS)}."
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="By name, or file.py:NAME; those of the task by default. The first one chooses.")
    ] = None,
    strengths: Annotated[str | None, typer.Option(help="Grid of γ and α (0.25,0.5,1).")] = None,
    ks: Annotated[str | None, typer.Option(help="Grid of numbers of heads (10).")] = None,
    layers: Annotated[str | None, typer.Option(help="Grid of a style vector's layers (a third, half, …).")] = None,
    choose_on: Annotated[int | None, typer.Option(min=0, help="Discovery examples a user that choose (1).")] = None,
    max_examples: HeldOutExamples = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="By default what the task needs.")] = None,
    baseline: Annotated[str | None, typer.Option(help="What the others are compared with (rag, or the first).")] = None,
    seed: Annotated[int | None, typer.Option(help="Of folds and random heads (0).")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="As in the other commands.")] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="auto (the default), float32, bfloat16 or float16.")] = None,
    force: Force = False,
    workers: Workers = None,
    ray: RayAddress = None,
    cpus: Cpus = 1,
    gpus: Gpus = 0,
    shard: ShardOf = None,
) -> None:
    """Compare ways to answer as the user would: metrics with intervals, settings chosen on discovery examples."""
    import dps_lens as dps
    from dps_lens.cli.config import read_config
    from dps_lens.files import write_text

    given = {
        "run": run, "users": users, "outputs": outputs, "max_users": max_users,
        "strict": strict or None, "pairs": pairs, "methods": methods,
        "metrics": metrics, "strengths": strengths, "ks": ks, "layers": layers, "choose_on": choose_on,
        "max_examples": max_examples,
        "max_new_tokens": max_new_tokens, "baseline": baseline, "seed": seed, "model": model, "device": device,
        "dtype": dtype,
        "chat_template_kwargs": template_kwargs(chat_template_kwargs) if chat_template_kwargs else None,
    }  # fmt: skip
    wanted = read_config(config, {name: value for name, value in given.items() if value is not None})
    with engine_of(workers, ray, cpus, gpus, shard) as engine:
        loaded = load_for(engine, wanted.model, wanted.device, wanted.dtype)
        people = dps.load_users(wanted.users, outputs=wanted.outputs, max_users=wanted.max_users, strict=wanted.strict)
        people = paired(people, wanted.pairs)
        people = with_discovery("evaluate", people, strict=wanted.strict) if people[0].task.has_pairs else people
        table = dps.evaluate(
            loaded,
            people,
            _methods(wanted, loaded, people, engine),
            metrics=[load_object(one, dps.Metric) if is_path(one) else one for one in wanted.metrics] or None,
            strengths=wanted.strengths,
            ks=wanted.ks,
            max_examples=wanted.max_examples,
            max_new_tokens=wanted.max_new_tokens,
            prompt_config=_prompt_config(wanted),
            evaluate_config=dps.EvaluateConfig(layers=wanted.layers, choose_on=wanted.choose_on),
            seed=wanted.seed,
            out=out,
            engine=engine,
            run_config=dps.RunConfig(force=force),
        )
    write_text(out / "answers.csv", table.rows.to_csv(index=False))
    write_text(out / "config.yaml", wanted.as_yaml())
    baseline = wanted.baseline or ("rag" if "rag" in table.methods else table.methods[0])
    print_evaluation(table, baseline)
    write_text(out / "evaluation.html", table.plot(baseline=baseline).to_html(include_plotlyjs=True))
    say_shard(shard, out)
    typer.echo(f"answers.csv, evaluation.json, evaluation.html and config.yaml are in {out}")


def _prompt_config(wanted: "EvaluateConfig") -> "PromptConfig | None":
    """None lets the scores' own hold."""
    from dps_lens.data import PromptConfig

    kwargs = wanted.chat_template_kwargs
    return None if kwargs is None else PromptConfig(chat_template_kwargs=kwargs)


def _methods(
    wanted: "EvaluateConfig", model: "HookedModel", users: "list[User]", engine: "Engine | None"
) -> Mapping[str, Any]:
    """Methods by name; families are made where a method asks for them."""
    from dps_lens.errors import EvaluationError
    from dps_lens.evaluation.methods import takes_heads

    made = _Families(wanted, model, users, engine)
    methods: dict[str, Any] = {}
    for method in wanted.methods:
        word, family = _apart(method)
        rule = rule_of(word)
        takes = takes_heads(rule)
        if family and not takes:
            raise EvaluationError(f"evaluate: method {method!r}: {word} takes no heads")
        usual = "retrieval" if "decore" in word.split("+") else "preference"
        methods[method] = (rule, made.of(method, family or usual)) if takes else rule
    return methods


def _apart(method: str) -> tuple[str, str]:
    """A rule and its family, `RULE:FAMILY`, either of which may be an import path."""
    if not is_path(method):
        for cut in (index for index, letter in enumerate(method) if letter == ":"):
            word, family = method[:cut], method[cut + 1 :]
            if is_path(word) or "." not in word:
                return word, family
    return method, ""


class _Families:
    """Heads by the name of their family, made once."""

    def __init__(
        self, wanted: "EvaluateConfig", model: "HookedModel", users: "list[User]", engine: "Engine | None"
    ) -> None:
        self._wanted, self._model, self._users, self._engine = wanted, model, users, engine
        self._made: dict[str, Any] = {}

    def of(self, method: str, name: str) -> Any:
        import dps_lens as dps
        from dps_lens.errors import EvaluationError

        if name in ("preference", "random") and self._wanted.run is None:
            raise EvaluationError(f"evaluate: method {method!r} needs the scores of 'dps-lens score'; give --run")
        if name not in self._made:
            if name == "preference":
                self._made[name] = dps.HeadScores.load(str(self._wanted.run))
                check_same_model("evaluate", self._made[name], self._model)
            elif name == "random":
                self._made[name] = self._random(self.of(method, "preference"))
            else:
                (self._made[name],) = dps.reference_heads(self._model, families(name), engine=self._engine).values()
        return self._made[name]

    def _random(self, scores: "HeadScores") -> "dict[str, HeadSet]":
        """For every user, other heads of the layers of the Preference Heads that the user is tested with."""
        import dps_lens as dps
        from dps_lens.errors import EvaluationError
        from dps_lens.selection import draw_seed, rankings

        ks, seed = self._wanted.ks, self._wanted.seed
        if len(ks) > 1:
            raise EvaluationError("evaluate: random heads are matched to sets of one size; give one K")
        tested = rankings("evaluate", {"preference": scores}, self._users, ks, seed=seed)[0]["preference"]
        return {
            user: dps.random_heads(self._model, like, match="nearest", seed=draw_seed(seed, number))
            for number, (user, (like,)) in enumerate(tested.items())
        }
