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

from dps_lens.analysis.rankings import Rankings, Select, rankings
from dps_lens.data import Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.tasks import Task
from dps_lens.data.tokenizer import PromptTokenizer, without_special
from dps_lens.evaluation.answers import fluency, measured, text_of
from dps_lens.evaluation.checks import check_bench
from dps_lens.evaluation.cost import COSTS, measure_costs
from dps_lens.evaluation.methods import Method, Row, Setting, describe, write
from dps_lens.evaluation.metrics import lower_is_better, metrics_of, score_example, summary_of
from dps_lens.evaluation.portraits import Part, Portraits
from dps_lens.evaluation.result import REFERENCE, Evaluation
from dps_lens.evaluation.style import StyleMeasure
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel, describe_model
from dps_lens.runs import Engine, RunFolder, Units, Work, make_units
from dps_lens.scores import HeadScores
from dps_lens.scoring.sweep import data_digest

_COSTS = "costs"


@dataclass
class Bench(Work):
    """One setting of `evaluate`.

    Attributes:
        choice: the setting of every method, once it is chosen.
    """

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
    choice: dict[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_bench(self)

    @property
    def task(self) -> Task:
        return self.users[0].task

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

    def run(
        self, folder: RunFolder | None, manifest: dict[str, Any], engine: Engine | None, progress: bool
    ) -> Evaluation:
        """What is made of users, choice, answers, costs."""
        where: dict[str, Any] = {"folder": folder, "engine": engine, "progress": progress}
        described = make_units(self, list(self.parts), what="describing users", unit="part", split=False, **where)
        self.portraits.made.update(described.made)
        chosen_on = make_units(self, list(self.choosing_by_key), what="choosing", split=False, **where)
        self.choice, choices = self.choose(chosen_on.made)
        answered = make_units(self, list(self.by_key), what="answering", **where)
        costs = make_units(self, [_COSTS], what="timing", split=False, **where).made[_COSTS]
        rows: list[dict[str, Any]] = []
        style = None if self.task.closed else StyleMeasure(self.users)
        for key, unit in answered.made.items():
            example = self.by_key[key]
            answers = {name: unit[f"tokens.{index}"] for index, name in enumerate(self.choice)}
            answers[REFERENCE] = self.cut_reference(example)
            rows += measured(self.model, example, answers, unit["fluency"].tolist(), style)
        columns = {name: costs[name].tolist() for name in COSTS}
        frame = pd.DataFrame({"method": list(self.defined), **columns})
        given_up = described.quarantined | chosen_on.quarantined | answered.quarantined
        Units({}, given_up).note(manifest, engine)
        return Evaluation(pd.DataFrame(rows), choices, frame, self.task, manifest)

    @cached_property
    def portraits(self) -> Portraits:
        return Portraits(self.model, self.users, self.prompt, newest=self.vector_examples)

    @cached_property
    def parts(self) -> dict[str, Callable[[], Part]]:
        """What methods need of users, by key, and how each part is made."""
        return {key: make for user in self.users for key, make in self.parts_of(user.id).items()}

    def parts_of(self, user_id: str) -> dict[str, Callable[[], Part]]:
        found: dict[str, Callable[[], Part]] = {}
        for name, method in self.defined.items():
            for kind in method.needs:
                for leave_out in (0, self.choose_on) if name in self.several else (0,):
                    found |= self.portraits.parts(kind, user_id, leave_out)
        return found

    @cached_property
    def by_key(self) -> dict[str, Example]:
        """Evaluation examples by the keys of their answers."""
        return {f"answer|{example.user_id}|{example.id}": example for example in self.examples}

    @cached_property
    def choosing_by_key(self) -> dict[str, Example]:
        examples = self.choosing if self.several else []
        return {f"choose|{example.user_id}|{example.id}": example for example in examples}

    def owner(self, key: str) -> str:
        return self.by_key[key].user_id

    def given(self, key: str) -> dict[str, Part]:
        """The parts of a unit's user."""
        example = (self.by_key | self.choosing_by_key | {_COSTS: self.examples[0]}).get(key)
        parts = self.parts_of(example.user_id) if example else ()
        return {part: self.portraits.made[part] for part in parts if part in self.portraits.made}

    def make(self, key: str, given: Any = None) -> dict[str, Tensor]:
        self.portraits.made.update(given or {})
        if key in self.by_key:
            return self.answer(self.by_key[key], self.rows_of(self.by_key[key]))
        if key in self.choosing_by_key:
            example = self.choosing_by_key[key]
            return self.write(
                example, [self.row(example, self.several[n], one, self.choose_on) for n, one in self.plan]
            )
        if key == _COSTS:
            first = self.examples[0]
            return measure_costs(self.model, self.prompts(first), self.rows_of(first), self.length)
        return self.parts[key]()

    def rows_of(self, example: Example) -> list[Row]:
        return [self.row(example, self.defined[name], one) for name, one in self.choice.items()]

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
        metric = metrics_of(self.task)[0]
        rows = []
        for key, unit in units.items():
            example = self.choosing_by_key[key]
            for index, (name, setting) in enumerate(self.plan):
                text = text_of(self.model, unit[f"tokens.{index}"])
                score = score_example(example, text, synonyms=False)[metric]
                rows.append({"method": name, "setting": setting, "user": example.user_id, metric: score})
        chosen, table = {}, []
        for name, method in self.defined.items():
            values = {}
            for setting in method.settings if name in self.several else ():
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
