"""One setting of `evaluate`: what is run for a user and an example, and how the table is put together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from warnings import warn

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.adapters.tuning import check_tunable
from dps_lens.checks import check_flag
from dps_lens.data import Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.examples import held_out_examples, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.data.tasks import Task
from dps_lens.data.tokenizer import PromptTokenizer, without_special
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.answers import fluency, measured, profile_of, rank, rank_scores, text_of
from dps_lens.evaluation.artifacts import Artifacts, Part
from dps_lens.evaluation.cost import COSTS, measure_costs
from dps_lens.evaluation.methods import Method, Setting, Writer, describe, write
from dps_lens.evaluation.metrics import Metric, check_reference, metric_libraries, metrics_of, score_text
from dps_lens.evaluation.result import REFERENCE, Evaluation
from dps_lens.evaluation.style import StyleMeasure
from dps_lens.found import FoundHeads
from dps_lens.heads import HeadSet
from dps_lens.literals import Select
from dps_lens.model import HookedModel
from dps_lens.scores import HeadScores
from dps_lens.selection import Rankings, check_held_out, rankings, undefined_of
from dps_lens.steering.vector import Vector
from dps_lens.work import Run, Work

_COSTS = "costs"


@dataclass(frozen=True)
class EvaluateConfig:
    """Rare settings of `evaluate`.

    Attributes:
        layers: the grid of a vector's layer; a third, half and two thirds of the way up by default.
        choose_on: the newest so many discovery examples of each user choose; 0 where no method has a choice.
        vector_examples: the newest so many discovery examples that a vector or LoRA is made of; those that choose are
            left out while choosing.
        select: as in `ablation_curve`; with `"user"`, heads are ranked by the discovery examples that also choose.
        exclude: as in `HeldOutConfig`.
        costs: also measure what a token of each method takes, in time and in FLOPs.
    """

    layers: Sequence[int] | None = None
    choose_on: int = 1
    vector_examples: int | None = 8
    select: Select | Mapping[str, Select] = "global"
    exclude: Mapping[str, HeadSet] = field(default_factory=dict)
    costs: bool = True

    def __post_init__(self) -> None:
        check_flag(EvaluationError, "EvaluateConfig: costs", self.costs)


@dataclass
class Bench(Work):
    """One setting of `evaluate`.

    Attributes:
        choice: the setting of every method, once it is chosen.
    """

    model: HookedModel
    users: list[User]
    methods: dict[str, Method]
    asked_metrics: tuple[Metric, ...]
    ks: tuple[int, ...]
    config: EvaluateConfig
    max_examples: int | None
    max_new_tokens: int | None
    prompt_config: PromptConfig
    seed: int
    choice: dict[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def task(self) -> Task:
        return self.users[0].task

    @cached_property
    def examples(self) -> list[Example]:
        """Evaluation examples, user by user."""
        return held_out_examples("evaluate", self.users, self.max_examples)

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """What answers are measured by; settings are chosen by the first."""
        references = [example.reference for example in self.examples]
        return self.asked_metrics or metrics_of(self.task, references, ranked=not self.unranked)

    @cached_property
    def unranked(self) -> str:
        """Why the likelihoods of an example's answers cannot be compared; empty where they can be, on all examples."""
        tokenizer, length = PromptTokenizer(self.model), self.prompt_config.response_tokens
        for example in (*self.examples, *self.choosing):
            about = f"example {example.id!r} of user {example.user_id!r}"
            if not example.rejected:
                return f"{about} has one answer only; load pairs or choices, or make_pairs(users)"
            answers = {tuple(tokenizer.answer(text, length)) for text in (example.reference, *example.rejected)}
            if () in answers or len(answers) <= len(example.rejected):
                return f"answers of {about} are empty or alike for response_tokens; raise it in PromptConfig"
        return ""

    @property
    def ranks(self) -> bool:
        """Whether the likelihoods of an example's answers are compared."""
        return any(metric.ranks for metric in self.metrics)

    def discovery(self, user: User) -> tuple[Example, ...]:
        return user.discovery_examples() if self.task.has_pairs else ()

    @cached_property
    def choosing(self) -> list[Example]:
        """Discovery examples that settings are chosen on; none where nothing is left to be chosen."""
        if not self.config.choose_on or not self.several:
            return []
        return [example for user in self.users for example in self.discovery(user)[-self.config.choose_on :]]

    @cached_property
    def undefined(self) -> dict[str, str]:
        """Methods whose heads the model does not show, with the reason."""
        return undefined_of({name: one.family for name, one in self.methods.items() if one.family is not None})

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
        config = self.config
        return rankings("evaluate", families, self.users, self.ks, config.select, config.exclude, self.seed)[0]

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        tested = {n: {user: [str(h) for h in of] for user, of in by.items()} for n, by in self.ranked.items()}
        tuned = any("lora" in method.needs for method in self.defined.values())
        return {
            "call": "evaluate",
            "task": self.task.name,
            "order": list(self.defined),  # of the answers in a unit
            "methods": describe(self.defined),
            "undefined": self.undefined,
            "sets": tested,
            "choose_on": self.config.choose_on,
            "vector_examples": self.config.vector_examples,
            "max_new_tokens": self.length,
            "seed": self.seed,
            "metrics": [metric.name for metric in self.metrics],
            "better": {metric.name: metric.better for metric in self.metrics},
            "measured_with": metric_libraries(*(["peft"] if tuned else [])),
            **describe_inputs(self.model, self.users, self.examples, self.prompt_config),
            "examples": [unit_key(example) for example in self.examples],
        }

    def run(self, run: Run) -> Evaluation:
        """What is made of users, choice, answers, costs."""
        run.open(self.fingerprint)
        described = run.units(self, list(self.parts), "describing users", unit="part", split=False)
        self.artifacts.made.update(described.made)
        chosen_on = run.units(self, list(self.choosing_by_key), "choosing", split=False)
        self.choice, choices = self.choose(chosen_on.made)
        answered = run.units(self, list(self.by_key), "answering")
        timed = run.units(self, [_COSTS] if self.config.costs else [], "timing", split=False).made
        rows: list[dict[str, Any]] = []
        style = None if self.task.closed else StyleMeasure(self.users)
        for key, unit in answered.made.items():
            example = self.by_key[key]
            answers = {name: unit[f"tokens.{index}"] for index, name in enumerate(self.choice)}
            answers[REFERENCE] = self.cut_reference(example)
            profile = profile_of(build_prompt(self.model, example, config=self.prompt_config))
            ranks = {}
            if self.ranks:
                scores = (rank_scores(nll, unit["length"]) for nll in unit["ranks"])
                ranks = dict(zip(self.choice, scores, strict=True))
            nlls = unit["fluency"].tolist()
            rows += measured(self.model, example, answers, nlls, style, self.metrics, profile, ranks)
        costs = pd.DataFrame(columns=["method", *COSTS])
        for unit in timed.values():
            costs = pd.DataFrame({"method": list(self.defined), **{name: unit[name].tolist() for name in COSTS}})
        return run.keep(Evaluation(pd.DataFrame(rows), choices, costs, self.task, run.manifest))

    @cached_property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.model, self.users, self.prompt_config, newest=self.config.vector_examples)

    @cached_property
    def parts(self) -> dict[str, Callable[[], Part]]:
        """What methods need of users, by key, and how each part is made."""
        return {key: make for user in self.users for key, make in self.parts_of(user.id).items()}

    def parts_of(self, user_id: str) -> dict[str, Callable[[], Part]]:
        parts: dict[str, Callable[[], Part]] = {}
        for name, method in self.defined.items():
            for kind in method.needs:
                for leave_out in (0, self.config.choose_on) if name in self.several else (0,):
                    parts |= self.artifacts.parts(kind, user_id, leave_out)
        return parts

    @cached_property
    def by_key(self) -> dict[str, Example]:
        """Evaluation examples by the keys of their answers."""
        return {f"answer|{unit_key(example)}": example for example in self.examples}

    @cached_property
    def choosing_by_key(self) -> dict[str, Example]:
        return {f"choose|{unit_key(example)}": example for example in self.choosing}

    def owner(self, key: str) -> str:
        return self.by_key[key].user_id

    def given(self, key: str) -> dict[str, Part]:
        """The parts of a unit's user."""
        example = (self.by_key | self.choosing_by_key | {_COSTS: self.examples[0]}).get(key)
        parts = self.parts_of(example.user_id) if example else ()
        return {part: self.artifacts.made[part] for part in parts if part in self.artifacts.made}

    def make(self, key: str, given: Any = None) -> dict[str, Tensor]:
        self.artifacts.made.update(given or {})
        if key in self.by_key:
            return self.answer(self.by_key[key], self.writers_of(self.by_key[key]))
        if key in self.choosing_by_key:
            example = self.choosing_by_key[key]
            writers = [self.writer(example, self.several[n], one, self.config.choose_on) for n, one in self.plan]
            if self.metrics[0].ranks:
                return rank(self.model, self.prompts(example), writers)
            return self.write(example, writers)
        if key == _COSTS:
            first = self.examples[0]
            return measure_costs(self.model, self.prompts(first), self.writers_of(first), self.length)
        return self.parts[key]()

    def writers_of(self, example: Example) -> list[Writer]:
        return [self.writer(example, self.defined[name], one) for name, one in self.choice.items()]

    def writer(self, example: Example, method: Method, setting: Setting, leave_out: int = 0) -> Writer:
        """A method with a setting, for the user of an example; made without the newest discovery examples."""
        heads, adapter = HeadSet(), None
        vector: Vector | None = None
        if method.family is not None and setting.k is not None:
            heads = self.ranked[method.name][example.user_id][self.ks.index(setting.k)]
        if method.vector == "heads":
            vector = self.artifacts.head_vector(example.user_id, heads, leave_out)
        elif method.vector and setting.layer is not None:
            vector = self.artifacts.vector(method.vector, example.user_id, setting.layer, leave_out)
        if method.adapter:
            adapter = self.artifacts.adapter(example.user_id, leave_out)
        return Writer(method, setting, heads, vector, adapter)

    @cached_property
    def several(self) -> dict[str, Method]:
        """Methods that leave something to be chosen."""
        return {name: method for name, method in self.defined.items() if len(method.settings) > 1}

    @property
    def plan(self) -> list[tuple[str, Setting]]:
        """What is tried on an example that chooses, in the order of its answers."""
        return [(name, setting) for name, method in self.several.items() for setting in method.settings]

    def choose(self, units: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Setting], pd.DataFrame]:
        """The setting of every method with the best mean over users, the first of equals; and the whole grid."""
        metric = self.metrics[0]
        rows = []
        for key, unit in units.items():
            example = self.choosing_by_key[key]
            for index, (name, setting) in enumerate(self.plan):
                about = {"method": name, "setting": setting, "user": example.user_id}
                if metric.ranks:
                    rows.append(about | rank_scores(unit["ranks"][index], unit["length"]))
                    continue
                text = text_of(self.model, unit[f"tokens.{index}"])
                scores = score_text(self.metrics, example.reference, text, slow=metric.slow)
                rows.append(about | {"text": text, "reference": example.reference, **scores})
        chosen, table = {}, []
        for name, method in self.defined.items():
            values = {}
            for setting in method.settings if name in self.several else ():
                own = pd.DataFrame([r for r in rows if (r["method"], r["setting"]) == (name, setting)])
                values[setting] = metric.of(own, self.task)
            chosen[name] = max(values, key=lambda one: metric.sign * values[one]) if values else method.settings[0]
            for setting in method.settings:
                about = {"method": name, "setting": str(setting), metric.name: values.get(setting, float("nan"))}
                table.append(about | {"chosen": setting == chosen[name]})
        return chosen, pd.DataFrame(table)

    @property
    def length(self) -> int:
        """Of an answer, in tokens, at most."""
        return self.max_new_tokens or self.task.max_new_tokens

    def write(self, example: Example, writers: Sequence[Writer]) -> dict[str, Tensor]:
        written = write(self.model, self.prompts(example), writers, self.length)
        return {f"tokens.{index}": tokens for index, tokens in enumerate(written)}

    def prompts(self, example: Example) -> dict[str, Prompt]:
        """By what they show, for all methods."""
        wanted: dict[str, Any] = {"own": "own", "none": "none"}
        if any(method.shows == "note" for method in self.defined.values()):
            wanted["note"] = self.artifacts.note(example.user_id)
        return {name: build_prompt(self.model, example, of, config=self.prompt_config) for name, of in wanted.items()}

    def answer(self, example: Example, writers: Sequence[Writer]) -> dict[str, Tensor]:
        """Tokens of every row, and how the unsteered model likes them, and what the user wrote, without a profile; and
        how likely each row finds the answers of a pair or a choice."""
        unit = self.write(example, writers)
        if self.ranks:
            unit |= rank(self.model, self.prompts(example), writers)
        none = build_prompt(self.model, example, "none", config=self.prompt_config)
        answers = [without_special(self.model, unit[f"tokens.{index}"]) for index in range(len(writers))]
        return unit | {"fluency": fluency(self.model, none, [*answers, self.cut_reference(example)])}

    def cut_reference(self, example: Example) -> Int[Tensor, " pos"]:
        """What the user wrote, no longer than an answer may be."""
        return torch.tensor(PromptTokenizer(self.model).answer(example.reference, self.length), dtype=torch.long)


def _check(bench: Bench) -> None:
    """Raise an error where methods, users and settings do not fit together."""
    if not bench.users or not bench.methods:
        raise EvaluationError("evaluate: give at least one user and one method")
    limits = (bench.max_examples, bench.max_new_tokens, bench.config.vector_examples)
    if bench.config.choose_on < 0 or any(limit is not None and limit < 1 for limit in limits):
        raise EvaluationError(
            "evaluate: choose_on is not negative; max_examples, max_new_tokens and vector_examples are at least 1"
        )
    tasks = sorted({user.task.name for user in bench.users})
    if len(tasks) > 1:
        raise EvaluationError(f"evaluate: users of several tasks ({', '.join(tasks)}); evaluate one at a time")
    _check_methods(bench)
    _check_users(bench)


def _check_methods(bench: Bench) -> None:
    if REFERENCE in bench.methods:
        raise EvaluationError(f"evaluate: {REFERENCE!r} is what the user wrote; call the method something else")
    for name, method in bench.methods.items():
        if method.adapter:
            check_tunable(f"evaluate: method {name!r}", bench.model)
        if not method.settings:
            raise EvaluationError(f"evaluate: method {name!r} has no setting; give a strength, K and layer")
        if len(method.settings) > 1 and not (bench.config.choose_on and bench.task.has_pairs):
            raise EvaluationError(
                f"evaluate: method {name!r} has several settings and nothing to choose them on "
                f"(choose_on={bench.config.choose_on}, task {bench.task.name}); give one strength, K and layer"
                + (", or raise choose_on" if bench.task.has_pairs else "")
            )
        outside = [one.layer for one in method.settings if one.layer not in (None, *range(bench.model.cfg.n_layers))]
        if outside:
            raise EvaluationError(
                f"evaluate: layer {outside[0]} is not in this model of {bench.model.cfg.n_layers} layers"
            )


def _check_users(bench: Bench) -> None:
    methods = bench.methods.values()
    least = bench.config.choose_on * any(len(method.settings) > 1 for method in methods)
    least += any(method.made for method in methods)
    for user in bench.users:
        if least and len(bench.discovery(user)) < least:
            raise EvaluationError(
                f"evaluate: user {user.id!r} has {len(bench.discovery(user))} discovery examples, {least} are "
                "needed; leave the user out"
            )
    for example in bench.examples:
        check_reference(example)
    if bench.ranks and bench.unranked:
        ranked = next(metric.name for metric in bench.metrics if metric.ranks)
        raise EvaluationError(f"evaluate: metric {ranked!r} compares answers, and {bench.unranked}")
    if not bench.asked_metrics and bench.unranked and any(example.rejected for example in bench.examples):
        warn(f"evaluate: answers are not ranked: {bench.unranked}", stacklevel=4)
    for method in methods:
        if isinstance(method.family, HeadScores | FoundHeads):
            check_held_out("evaluate", method.family, bench.examples)
