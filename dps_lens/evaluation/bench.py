"""The benchmark table: methods × metrics on the users' own tasks, settings chosen on discovery examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from warnings import warn

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.analysis.ablation import check_held_out
from dps_lens.analysis.rankings import Rankings, Select, rankings
from dps_lens.analysis.set_sweep import shared_settings
from dps_lens.data import Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.tokenizer import PromptTokenizer, without_special
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.answers import fluency, measured, text_of
from dps_lens.evaluation.cost import COSTS, measure_costs
from dps_lens.evaluation.methods import Asked, Method, Row, Setting, describe, find_method, write
from dps_lens.evaluation.metrics import check_reference, lower_is_better, metrics_of, score_example, summary_of
from dps_lens.evaluation.portraits import Portraits
from dps_lens.evaluation.result import REFERENCE, Evaluation
from dps_lens.evaluation.style import StyleMeasure
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel, describe_model
from dps_lens.runs import RunFolder, kept
from dps_lens.scores import HeadScores
from dps_lens.scoring.sweep import data_digest
from dps_lens.steering.tuning import check_tunable


def evaluate(
    model: HookedModel,
    users: Sequence[User],
    methods: Mapping[str, Asked],
    *,
    strengths: Sequence[float] = (0.25, 0.5, 1.0),
    ks: Sequence[int] = (10,),
    layers: Sequence[int] | None = None,
    choose_on: int = 1,
    vector_examples: int | None = 8,
    select: "Select | Mapping[str, Select]" = "global",
    exclude: Mapping[str, HeadSet] | None = None,
    max_examples: int | None = None,
    max_new_tokens: int | None = None,
    prompt: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Let every method answer the users' evaluation examples, and measure the answers.

    All methods share the prompts and the decoding loop of `generate`, greedily. What a method leaves open (strength,
    K, layer) is chosen for all users at once, by the task's first metric on discovery examples.

    | method | |
    |---|---|
    | `"plain"` | the task input alone |
    | `"rag"` | with the profile: the user's documents that retrieval finds |
    | `"prompt"` | with the model's own description of the user in place of the profile |
    | `"cad"`, `"cos"`, `"dola"` | rules of `generate`, with the profile |
    | `("dps", scores)`, `("decore", scores)`, `("amplify", scores)`, … | rules of heads, with the profile |
    | `"stylevector"`, `"steerx"` | vectors of the user (`style_vector`, `steerx_vector`), without the profile |
    | `"lora"` | the model with the user's LoRA, trained on discovery examples, without the profile |
    | `"rag+stylevector"`, `"rag+steerx"`, `"rag+lora"` | the same, with the profile |
    | `("dps+cad", scores)`, … | stacks |

    Args:
        model: a hooked model.
        users: of one task; their evaluation examples are answered.
        methods: name → method, in the order of the table.
        strengths: the grid of γ and α, and of what a LoRA's change is multiplied by.
        ks: the grid of numbers of heads.
        layers: the grid of a vector's layer; a third, half and two thirds of the way up by default.
        choose_on: the newest so many discovery examples of each user choose; 0 where no method has a choice.
        vector_examples: the newest so many discovery examples that a vector or LoRA is made of; those that choose are
            left out while choosing.
        select: as in `ablation_curve`; with `"user"`, heads are ranked by the discovery examples that also choose.
        exclude: as in `ablation_curve`.
        max_examples: the newest so many evaluation examples of each user.
        max_new_tokens: by default what the task needs.
        prompt: how prompts are built; by default as for the scores.
        seed: of the folds that select heads.
        out: a run folder, where the evaluation is saved; a run that is started again there resumes.
        force: drop what `out` holds.
        progress: show progress bars.

    Raises:
        EvaluationError: users of several tasks, an unknown method, nothing to choose on, a layer outside the model, or
            a reference that is not of the task's form.
        ScoreError: as `ablation_curve`.
        SteeringError: LoRA without peft, or on a `HookedTransformer`.
    """
    depth = model.cfg.n_layers
    grid = tuple(dict.fromkeys((depth // 3, depth // 2, 2 * depth // 3))) if layers is None else tuple(layers)
    found = {name: find_method(name, asked, strengths, ks, grid) for name, asked in methods.items()}
    families = {name: method.family for name, method in found.items() if method.family is not None}
    shared = shared_settings("evaluate", families, ablation=None, positions="response", prompt=prompt)
    bench = Bench(
        model, list(users), found, tuple(ks), choose_on, vector_examples, select, exclude or {}, max_examples,
        max_new_tokens, shared["prompt"], seed, progress,
    )  # fmt: skip
    manifest = bench.fingerprint()
    folder = RunFolder(out, manifest, force=force) if out is not None else None
    if out is not None:
        Evaluation.remove(out)
    evaluation = bench.run(folder, manifest)
    if out is not None:
        evaluation.save(out)
    return evaluation


@dataclass
class Bench:
    """One setting of `evaluate`."""

    model: HookedModel
    users: list[User]
    methods: dict[str, Method]
    ks: tuple[int, ...]
    choose_on: int
    vector_examples: int | None
    select: "Select | Mapping[str, Select]"
    exclude: Mapping[str, HeadSet]
    max_examples: int | None
    max_new_tokens: int | None
    prompt: PromptConfig
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        if not self.users or not self.methods:
            raise EvaluationError("evaluate: give at least one user and one method")
        limits = (self.max_examples, self.max_new_tokens, self.vector_examples)
        if self.choose_on < 0 or any(limit is not None and limit < 1 for limit in limits):
            raise EvaluationError(
                "evaluate: choose_on is not negative; max_examples, max_new_tokens and vector_examples are at least 1"
            )
        tasks = sorted({user.task.name for user in self.users})
        if len(tasks) > 1:
            raise EvaluationError(f"evaluate: users of several tasks ({', '.join(tasks)}); evaluate one at a time")
        self.task = self.users[0].task
        self._check_methods()
        self._check_users()

    def _check_methods(self) -> None:
        if REFERENCE in self.methods:
            raise EvaluationError(f"evaluate: {REFERENCE!r} is what the user wrote; call the method something else")
        for name, method in self.methods.items():
            if method.adapter:
                check_tunable(f"evaluate: method {name!r}", self.model)
            if not method.settings:
                raise EvaluationError(f"evaluate: method {name!r} has no setting; give a strength, K and layer")
            if len(method.settings) > 1 and not (self.choose_on and self.task.has_pairs):
                raise EvaluationError(
                    f"evaluate: method {name!r} has several settings and nothing to choose them on "
                    f"(choose_on={self.choose_on}, task {self.task.name}); give one strength, K and layer"
                    + (", or raise choose_on" if self.task.has_pairs else "")
                )
            outside = [one.layer for one in method.settings if one.layer not in (None, *range(self.model.cfg.n_layers))]
            if outside:
                raise EvaluationError(
                    f"evaluate: layer {outside[0]} is not in this model of {self.model.cfg.n_layers} layers"
                )

    def _check_users(self) -> None:
        methods = self.methods.values()
        least = self.choose_on * any(len(method.settings) > 1 for method in methods)
        least += any(method.made for method in methods)
        for user in self.users:
            if not user.examples:
                raise EvaluationError(f"evaluate: user {user.id!r} has no evaluation example; leave the user out")
            if least and len(self.discovery(user)) < least:
                raise EvaluationError(
                    f"evaluate: user {user.id!r} has {len(self.discovery(user))} discovery examples, {least} are "
                    "needed; leave the user out"
                )
        for example in self.examples:
            check_reference(example)
        for method in methods:
            if isinstance(method.family, HeadScores):
                check_held_out("evaluate", method.family, self.examples)

    @cached_property
    def examples(self) -> list[Example]:
        """Evaluation examples, user by user."""
        most = self.max_examples
        return [e for user in self.users for e in (user.examples[-most:] if most else user.examples)]

    def discovery(self, user: User) -> tuple[Example, ...]:
        return user.discovery_examples() if self.task.has_pairs else ()

    @cached_property
    def choosing(self) -> list[Example]:
        """Discovery examples that settings are chosen on."""
        return [example for user in self.users for example in self.discovery(user)[-self.choose_on :]]

    @cached_property
    def undefined(self) -> dict[str, str]:
        """Methods whose heads the model does not show, with the reason."""
        return {
            name: str(method.family.manifest.get("reason", "NaN scores"))
            for name, method in self.methods.items()
            if isinstance(method.family, HeadScores) and not method.family.defined
        }

    @cached_property
    def defined(self) -> dict[str, Method]:
        """The other methods."""
        return {name: method for name, method in self.methods.items() if name not in self.undefined}

    @cached_property
    def ranked(self) -> Rankings:
        families = {name: method.family for name, method in self.defined.items() if method.family is not None}
        for name, reason in self.undefined.items():
            warn(f"evaluate: method {name!r} is left out: {reason}", stacklevel=4)
        if not families:
            return {}
        return rankings("evaluate", families, self.users, self.ks, self.select, dict(self.exclude), self.seed)[0]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        tested = {n: {user: [str(h) for h in of] for user, of in by.items()} for n, by in self.ranked.items()}
        return {
            "call": "evaluate",
            "task": self.task.name,
            "order": list(self.defined),  # of the answers in a unit
            "methods": describe(self.defined),
            "undefined": self.undefined,
            "sets": tested,
            "choose_on": self.choose_on,
            "vector_examples": self.vector_examples,
            "max_new_tokens": self.length,
            "prompt": self.prompt.to_dict(),
            "seed": self.seed,
            "model": describe_model(self.model),
            "examples": [example.id for example in self.examples],
            "data": data_digest(self.users, self.examples),
        }

    def run(self, folder: RunFolder | None, manifest: dict[str, Any]) -> Evaluation:
        """Choice, answers, costs."""
        self.portraits = Portraits(self.model, self.users, self.prompt, newest=self.vector_examples, folder=folder)
        choice, choices = self.choose(folder)
        rows: list[dict[str, Any]] = []
        style = None if self.task.closed else StyleMeasure(self.users)
        for example in self.bar(self.examples, "answering"):
            chosen = self.rows_of(example, choice)
            unit = kept(folder, f"answer|{example.user_id}|{example.id}", partial(self.answer, example, chosen))
            answers = {row.method.name: unit[f"tokens.{index}"] for index, row in enumerate(chosen)}
            answers[REFERENCE] = self.cut_reference(example)
            rows += measured(self.model, example, answers, unit["fluency"].tolist(), style)
        first = self.examples[0]
        timed = partial(measure_costs, self.model, self.prompts(first), self.rows_of(first, choice), self.length)
        costs = kept(folder, "costs", timed)
        columns = {name: costs[name].tolist() for name in COSTS}
        frame = pd.DataFrame({"method": list(self.defined), **columns})
        return Evaluation(pd.DataFrame(rows), choices, frame, self.task, manifest)

    def bar(self, items: Any, what: str) -> Any:
        return tqdm(items, desc=what, unit="example", disable=None if self.progress else True)

    def rows_of(self, example: Example, settings: Mapping[str, Setting]) -> list[Row]:
        return [self.row(example, self.defined[name], one) for name, one in settings.items()]

    def row(self, example: Example, method: Method, setting: Setting, leave_out: int = 0) -> Row:
        """A method with a setting, for the user of an example; made without the newest discovery examples."""
        heads, vector, adapter = HeadSet(), None, None
        if method.family is not None and setting.k is not None:
            heads = self.ranked[method.name][example.user_id][self.ks.index(setting.k)]
        if method.vector and setting.layer is not None:
            vector = self.portraits.vector(method.vector, example.user_id, setting.layer, leave_out)
        if method.adapter:
            adapter = self.portraits.adapter(example.user_id, leave_out)
        return Row(method, setting, heads, vector, adapter)

    def choose(self, folder: RunFolder | None) -> tuple[dict[str, Setting], pd.DataFrame]:
        """The setting of every method with the best mean over users, the first of equals; and the whole grid."""
        several = {name: method for name, method in self.defined.items() if len(method.settings) > 1}
        metric = metrics_of(self.task)[0]
        plan = [(name, setting) for name, method in several.items() for setting in method.settings]
        rows = []
        for example in self.bar(self.choosing if several else [], "choosing"):
            ready = [self.row(example, self.defined[n], one, self.choose_on) for n, one in plan]
            unit = kept(folder, f"choose|{example.user_id}|{example.id}", partial(self.write, example, ready))
            for index, (name, setting) in enumerate(plan):
                text = text_of(self.model, unit[f"tokens.{index}"])
                score = score_example(example, text, synonyms=False)[metric]
                rows.append({"method": name, "setting": setting, "user": example.user_id, metric: score})
        chosen, table = {}, []
        for name, method in self.defined.items():
            values = {}
            for setting in method.settings if name in several else ():
                own = pd.DataFrame([r for r in rows if (r["method"], r["setting"]) == (name, setting)])
                values[setting] = summary_of(metric, self.task)(own)
            sign = -1 if lower_is_better(metric) else 1
            chosen[name] = max(values, key=lambda one: sign * values[one]) if values else method.settings[0]
            for setting in method.settings:
                about = {"method": name, "setting": str(setting), metric: values.get(setting, float("nan"))}
                table.append(about | {"chosen": setting == chosen[name]})
        return chosen, pd.DataFrame(table)

    @property
    def length(self) -> int:
        """Of an answer, in tokens, at most."""
        return self.max_new_tokens or self.task.max_new_tokens

    def write(self, example: Example, rows: Sequence[Row]) -> dict[str, Tensor]:
        written = write(self.model, self.prompts(example), rows, self.length)
        return {f"tokens.{index}": tokens for index, tokens in enumerate(written)}

    def prompts(self, example: Example) -> dict[str, Prompt]:
        """By what they show, for all methods."""
        wanted: dict[str, Any] = {"own": "own", "none": "none"}
        if any(method.shows == "note" for method in self.defined.values()):
            wanted["note"] = self.portraits.note(example.user_id)
        return {name: build_prompt(self.model, example, of, config=self.prompt) for name, of in wanted.items()}

    def answer(self, example: Example, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Tokens of every row, and how the unsteered model likes them, and what the user wrote, without a profile."""
        found = self.write(example, rows)
        none = build_prompt(self.model, example, "none", config=self.prompt)
        answers = [without_special(self.model, found[f"tokens.{index}"]) for index in range(len(rows))]
        return found | {"fluency": fluency(self.model, none, [*answers, self.cut_reference(example)])}

    def cut_reference(self, example: Example) -> Int[Tensor, " pos"]:
        """What the user wrote, no longer than an answer may be."""
        return torch.tensor(PromptTokenizer(self.model).answer(example.reference, self.length), dtype=torch.long)
