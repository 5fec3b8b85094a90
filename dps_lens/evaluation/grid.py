"""Steered texts at every γ and K, token by token: for sliders, and for the Pareto view of style against fluency."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dps_lens.data import PromptConfig, User, build_prompt
from dps_lens.data.examples import key_of
from dps_lens.data.tokenizer import without_special
from dps_lens.errors import EvaluationError, SteeringError
from dps_lens.evaluation.answers import fluency, measured, profile_of
from dps_lens.evaluation.metrics import Metric, metric_libraries, metrics_of
from dps_lens.evaluation.style import StyleMeasure
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.result import Result
from dps_lens.selection import HeadSource
from dps_lens.stats.intervals import columns, interval
from dps_lens.steering import DecodeConfig, generate
from dps_lens.steering.rules import Rule, RuleLike, find_rule
from dps_lens.validation.work import HeldOutConfig, HeldOutWork
from dps_lens.work import Engine, Run, RunConfig

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class SteeredText:
    """One answer.

    Attributes:
        user: who asked.
        example: what was asked.
        gamma: strength of the heads; 0 is the model's own decoding.
        k: number of heads; 0 beside γ = 0.
        heads: their names.
        text: the answer.
        pieces: text of each token.
        shifts: log p steered − log p full of each token, nats; None where the full model did not run.
        kl: KL(steered ‖ full) at each step, nats; None as above.
        alternatives: for each token, what steering made likelier and less likely: `(piece, p steered − p full)`.
        scores: the task's metrics, `style`, `NLL` and `repeated`, as in `evaluate`.
    """

    user: str
    example: str
    gamma: float
    k: int
    heads: str
    text: str
    pieces: list[str]
    shifts: list[float | None]
    kl: list[float | None]
    alternatives: list[list[tuple[str, float]]]
    scores: dict[str, float]

    @property
    def key(self) -> str:
        """Of its user and example."""
        return key_of(self.user, self.example)


@dataclass(frozen=True, repr=False)
class SteeringGrid(Result):
    """Answers at every γ and K.

    Attributes:
        texts: one an example, γ and K; γ = 0 once an example.
        gammas: strengths, without 0.
        ks: numbers of heads.
        references: what the user wrote, by the key of user and example.
        manifest: settings.
    """

    stem: ClassVar[str] = "grid"
    figure: ClassVar[str] = "pareto"
    error: ClassVar[type[EvaluationError]] = EvaluationError
    parts: ClassVar[tuple[type, ...]] = (SteeredText,)

    texts: tuple[SteeredText, ...]
    gammas: tuple[float, ...]
    ks: tuple[int, ...]
    references: dict[str, str]
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        return f"{len(self.texts)} texts of rule {self.manifest.get('rule')!r}, γ in {self.gammas}, K in {self.ks}"

    @property
    def measures(self) -> tuple[str, ...]:
        """What every answer was measured by, and `KL`, the mean a step."""
        return (*dict.fromkeys(name for one in self.texts for name in one.scores), "KL")

    def find(self, example: str, gamma: float, k: int, *, user: str | None = None) -> SteeredText:
        """One answer; any K stands for γ = 0. Where several users have an example of this id, name the user.

        Raises:
            EvaluationError: it is not in the grid, or there are several.
        """
        asked = [one for one in self.texts if one.example == example and user in (None, one.user)]
        if len(owners := {one.user for one in asked}) > 1:
            raise EvaluationError(
                f"grid: {len(owners)} users have an example {example!r}; give user=, such as {min(owners)!r}"
            )
        for one in asked:
            if one.gamma == gamma and (one.k == k or not gamma):
                return one
        raise EvaluationError(
            f"grid: no text of example {example!r} at γ = {gamma:g} and K = {k}; γ is one of "
            f"{(0.0, *self.gammas)}, K one of {self.ks}"
        )

    def to_frame(self, level: float = 0.95) -> "pandas.DataFrame":
        """One row a γ, K and measure: `mean` of user means with its Student's t interval over users, and
        `difference` to γ = 0 with `difference_low` and `difference_high`, paired by example."""
        import pandas as pd

        plain = {one.key: one for one in self.texts if not one.gamma}
        rows = []
        for gamma, k in dict.fromkeys((one.gamma, one.k) for one in self.texts):
            chosen = [one for one in self.texts if (one.gamma, one.k) == (gamma, k)]
            for name in self.measures:
                row: dict[str, Any] = {"gamma": gamma, "K": k, "measure": name}
                values = [(one.user, _value(one, name)) for one in chosen]
                change = [(one.user, _value(one, name) - _value(plain[one.key], name)) for one in chosen]
                row |= interval(_user_means(values), level)
                row |= columns("difference", interval(_user_means(change), level)) if gamma else {}
                rows.append(row)
        return pd.DataFrame(rows)


def steering_grid(
    model: HookedModel,
    users: Sequence[User],
    heads: HeadSource,
    *,
    gammas: Sequence[float] = (0.5, 1.0, 2.0),
    ks: Sequence[int] = (5, 10),
    rule: RuleLike = "dps",
    max_examples: int | None = 1,
    max_new_tokens: int | None = None,
    alternatives: int = 3,
    prompt_config: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> SteeringGrid:
    """Let a rule of heads answer the users' evaluation examples at every strength and number of heads, greedily.

    Args:
        model: a hooked model.
        users: of one task; their evaluation examples are answered.
        heads: scores, a ranking, or one for each user, as in `ablation_curve`; scores of the same users choose by
            folds.
        gammas: strengths, at least −1. γ = 0 is always there.
        ks: numbers of heads.
        rule: a rule of `generate` that needs heads and no negative prompt.
        max_examples: the newest so many evaluation examples of each user; None takes all.
        max_new_tokens: by default what the task needs.
        alternatives: tokens kept that gained, and that lost, most probability at every step.
        prompt_config: how prompts are built; by default as for the scores.
        seed: of the folds.
        out: a folder; finished examples are kept there, and a call that is started again resumes.
        engine: as in `score_heads`.
        run_config: force, progress bars.

    Raises:
        SteeringError: the rule takes no heads, or needs a negative prompt or vectors.
        EvaluationError: no users, several tasks, or a user without evaluation examples.
    """
    chosen = find_rule(rule)
    if not chosen.needs_heads or chosen.needs_negative or chosen.needs_vectors:
        raise SteeringError(f"steering_grid: rule {chosen.name!r} must work with heads alone, such as 'dps'")
    if not users or len({user.task.name for user in users}) > 1 or not all(user.examples for user in users):
        raise EvaluationError("steering_grid: give users of one task, each with an evaluation example")
    strengths, sizes = tuple(sorted({float(g) for g in gammas} - {0.0})), tuple(sorted(set(ks)))
    if not strengths or not sizes or sizes[0] < 1 or strengths[0] < -1:
        raise EvaluationError("steering_grid: give one γ that is not 0, at least −1, and one K of at least 1")
    run = Run(model, SteeringGrid, out, engine, run_config)
    work = GridWork.of(
        "steering_grid",
        model,
        users,
        {"heads": heads},
        sizes,
        prompt_config=prompt_config,
        config=HeldOutConfig(positions="response"),
        n_random=0,
        select="global",
        max_examples=max_examples,
        seed=seed,
        rule=chosen,
        gammas=strengths,
        length=max_new_tokens or users[0].task.max_new_tokens,
        alternatives=alternatives,
    )
    run.open(work.fingerprint)
    units = run.units(work, list(work.by_key), "steering")
    texts = [text for unit in units.made.values() for text in _unpacked(unit)]
    references = {key: one.reference for key, one in work.by_key.items()}
    return run.keep(SteeringGrid(tuple(texts), strengths, sizes, references, run.manifest))


@dataclass
class GridWork(HeldOutWork):
    """The run of `steering_grid`."""

    uses: ClassVar[tuple[str, ...]] = ("positions", "prompt_config")

    rule: Rule = field(default_factory=lambda: find_rule("dps"))
    gammas: tuple[float, ...] = ()
    length: int = 0
    alternatives: int = 0

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        return metrics_of(self.users[0].task, [example.reference for example in self.examples])

    @cached_property
    def style(self) -> StyleMeasure | None:
        return None if self.users[0].task.closed else StyleMeasure(self.users)

    def fingerprint(self) -> dict[str, Any]:
        more = {"rule": self.rule.settings(), "gammas": list(self.gammas), "max_new_tokens": self.length}
        return super().fingerprint() | more | {"alternatives": self.alternatives, "measured_with": metric_libraries()}

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        example, model, config = self.by_key[key], self.model, self.settings.prompt_config
        sets = dict(zip(self.ks, self.ranked[0]["heads"][example.user_id], strict=True))
        settings = [(0.0, 0), *((gamma, k) for k in self.ks for gamma in self.gammas)]
        heads: list[HeadSet] = [sets[k or min(sets)] for _, k in settings]
        own = build_prompt(model, example, config=config)
        written = generate(
            model,
            [own] * len(settings),
            heads=heads,
            gamma=[gamma for gamma, _ in settings],
            rule=self.rule,
            max_new_tokens=self.length,
            decode_config=DecodeConfig(keep_alternatives=self.alternatives),
        )
        none = build_prompt(model, example, "none", config=config)
        answers = {str(index): without_special(model, tokens) for index, tokens in enumerate(written.tokens)}
        nlls, metrics = fluency(model, none, list(answers.values())).tolist(), self.metrics
        rows = measured(model, example, answers, nlls, self.style, metrics, profile_of(own))
        names = (*(metric.name for metric in metrics), "style", "author", "NLL", "repeated", "copied")
        texts = [
            SteeredText(
                example.user_id,
                example.id,
                gamma,
                k,
                str(heads[index]) if k else "",
                row["text"],
                written.pieces[index],
                _plain(written.shifts[index].tolist()),
                _plain(written.kl[index].tolist()),
                written.alternatives[index] if written.alternatives else [],
                {name: float(row[name]) for name in names if not math.isnan(row.get(name, math.nan))},
            )
            for index, ((gamma, k), row) in enumerate(zip(settings, rows, strict=True))
        ]
        packed = json.dumps([asdict(one) for one in texts]).encode()
        return {"json": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}


def _unpacked(unit: Mapping[str, Tensor]) -> list[SteeredText]:
    return [_text(**one) for one in json.loads(bytes(unit["json"].tolist()))]


def _plain(values: Sequence[float]) -> list[float | None]:
    """JSON knows no NaN."""
    return [None if math.isnan(value) else round(value, 4) for value in values]


def _text(**fields: Any) -> SteeredText:
    fields["alternatives"] = [[(piece, change) for piece, change in step] for step in fields["alternatives"]]
    return SteeredText(**fields)


def _value(one: SteeredText, name: str) -> float:
    if name != "KL":
        return one.scores.get(name, math.nan)
    known = [value for value in one.kl if value is not None]
    return sum(known) / len(known) if known else math.nan


def _user_means(values: Sequence[tuple[str, float]]) -> np.ndarray:
    by_user: dict[str, list[float]] = {}
    for user, value in values:
        if not math.isnan(value):
            by_user.setdefault(user, []).append(value)
    return np.array([float(np.mean(of)) for of in by_user.values()] or [math.nan])
