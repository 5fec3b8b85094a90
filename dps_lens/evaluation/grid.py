"""Steered texts at every γ and K, token by token: for sliders, and for the Pareto view of style against fluency."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.analysis.intervals import interval
from dps_lens.analysis.rankings import Family, rankings
from dps_lens.analysis.set_sweep import shared_settings
from dps_lens.data import Example, PromptConfig, User, build_prompt
from dps_lens.data.tokenizer import without_special
from dps_lens.errors import EvaluationError, SteeringError
from dps_lens.evaluation.answers import fluency, measured
from dps_lens.evaluation.metrics import metrics_of
from dps_lens.evaluation.style import StyleMeasure
from dps_lens.files import write_json
from dps_lens.model import HookedModel, describe_model
from dps_lens.runs import RunFolder, kept
from dps_lens.scoring.sweep import data_digest
from dps_lens.steering import generate
from dps_lens.steering.rules import find_rule

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

_FILE = "grid.json"


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


@dataclass(frozen=True)
class SteeringGrid:
    """Answers at every γ and K.

    Attributes:
        texts: one an example, γ and K; γ = 0 once an example.
        gammas: strengths, without 0.
        ks: numbers of heads.
        references: example → what the user wrote.
        manifest: settings.
    """

    texts: tuple[SteeredText, ...]
    gammas: tuple[float, ...]
    ks: tuple[int, ...]
    references: dict[str, str]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def measures(self) -> tuple[str, ...]:
        """What every answer was measured by, and `KL`, the mean a step."""
        return (*dict.fromkeys(name for one in self.texts for name in one.scores), "KL")

    def find(self, example: str, gamma: float, k: int) -> SteeredText:
        """One answer; any K stands for γ = 0.

        Raises:
            EvaluationError: it is not in the grid.
        """
        for one in self.texts:
            if (one.example, one.gamma) == (example, gamma) and (one.k == k or not gamma):
                return one
        raise EvaluationError(
            f"grid: no text of example {example!r} at γ = {gamma:g} and K = {k}; γ is one of "
            f"{(0.0, *self.gammas)}, K one of {self.ks}"
        )

    def to_frame(self, level: float = 0.95) -> "pandas.DataFrame":
        """One row a γ, K and measure: `mean` of user means with its Student's t interval over users, and
        `difference` to γ = 0 with `difference_low` and `difference_high`, paired by example."""
        import pandas as pd

        plain = {one.example: one for one in self.texts if not one.gamma}
        rows = []
        for gamma, k in dict.fromkeys((one.gamma, one.k) for one in self.texts):
            chosen = [one for one in self.texts if (one.gamma, one.k) == (gamma, k)]
            for name in self.measures:
                row: dict[str, Any] = {"gamma": gamma, "K": k, "measure": name}
                values = [(one.user, _value(one, name)) for one in chosen]
                change = [(one.user, _value(one, name) - _value(plain[one.example], name)) for one in chosen]
                row |= interval(_user_means(values), level)
                found = interval(_user_means(change), level) if gamma else {}
                row |= {("difference" if key == "mean" else f"difference_{key}"): found[key] for key in found}
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, **options: Any) -> "plotly.graph_objects.Figure":
        """`dps_lens.plots.pareto` of this grid."""
        from dps_lens.plots import pareto

        return pareto(self, **options)

    def save(self, folder: str | Path) -> None:
        """Write the grid; `load` reads it."""
        write_json(
            Path(folder) / _FILE,
            {
                "texts": [asdict(one) for one in self.texts],
                "gammas": self.gammas,
                "ks": self.ks,
                "references": self.references,
                "manifest": self.manifest,
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "SteeringGrid":
        """Read what `save` wrote.

        Raises:
            EvaluationError: the folder holds no whole grid.
        """
        try:
            found = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise EvaluationError(f"{folder} holds no whole steering grid ({type(error).__name__})") from error
        texts = tuple(_text(**one) for one in found["texts"])
        return cls(texts, tuple(found["gammas"]), tuple(found["ks"]), found["references"], found["manifest"])


def steering_grid(
    model: HookedModel,
    users: Sequence[User],
    heads: Family,
    *,
    gammas: Sequence[float] = (0.5, 1.0, 2.0),
    ks: Sequence[int] = (5, 10),
    rule: str = "dps",
    max_examples: int | None = 1,
    max_new_tokens: int | None = None,
    alternatives: int = 3,
    prompt: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> SteeringGrid:
    """Let a rule of heads answer the users' evaluation examples at every strength and number of heads, greedily.

    Args:
        model: a hooked model.
        users: of one task; their evaluation examples are answered.
        heads: scores, a ranking, or one for each user, as in `ablation_curve`; scores of the same users choose by
            folds.
        gammas: strengths, at least −1. γ = 0 is always there.
        ks: numbers of heads.
        rule: a rule of `generate` that needs heads and no second prompt.
        max_examples: the newest so many evaluation examples of each user; None takes all.
        max_new_tokens: by default what the task needs.
        alternatives: tokens kept that gained, and that lost, most probability at every step.
        prompt: how prompts are built; by default as for the scores.
        seed: of the folds.
        out: a folder; finished examples are kept there, and a call that is started again resumes.
        force: drop what `out` holds.
        progress: show a progress bar.

    Raises:
        SteeringError: the rule takes no heads, or needs a second prompt.
        EvaluationError: no users, several tasks, or a user without evaluation examples.
    """
    found = find_rule(rule)
    if not found.needs_heads or found.prompt:
        raise SteeringError(f"steering_grid: rule {rule!r} must work with heads alone, such as 'dps'")
    if not users or len({user.task.name for user in users}) > 1 or not all(user.examples for user in users):
        raise EvaluationError("steering_grid: give users of one task, each with an evaluation example")
    strengths, sizes = tuple(sorted({float(g) for g in gammas} - {0.0})), tuple(sorted(set(ks)))
    if not strengths or not sizes or sizes[0] < 1 or strengths[0] < -1:
        raise EvaluationError("steering_grid: give one γ that is not 0, at least −1, and one K of at least 1")
    config = shared_settings("steering_grid", {"heads": heads}, ablation=None, positions="response", prompt=prompt)
    ranked = rankings("steering_grid", {"heads": heads}, users, sizes, seed=seed)[0]
    examples = [one for user in users for one in (user.examples[-max_examples:] if max_examples else user.examples)]
    length = max_new_tokens or users[0].task.max_new_tokens
    manifest = {
        "call": "steering_grid",
        "rule": rule,
        "gammas": list(strengths),
        "ks": list(sizes),
        "max_new_tokens": length,
        "alternatives": alternatives,
        "prompt": config["prompt"].to_dict(),
        "seed": seed,
        "sets": {user: [str(one) for one in of] for user, of in ranked["heads"].items()},
        "model": describe_model(model),
        "data": data_digest(list(users), examples),
    }
    style = None if users[0].task.closed else StyleMeasure(users)
    settings = [(0.0, 0), *((gamma, k) for k in sizes for gamma in strengths)]
    write = partial(_write, model, rule=rule, settings=settings, config=config["prompt"], length=length)
    folder = RunFolder(out, manifest, force=force) if out is not None else None
    texts: list[SteeredText] = []
    for example in tqdm(examples, desc="steering", unit="example", disable=None if progress else True):
        sets = dict(zip(sizes, ranked["heads"][example.user_id], strict=True))
        make = partial(write, example, sets=sets, style=style, alternatives=alternatives)
        texts += _unpacked(kept(folder, f"grid|{example.user_id}|{example.id}", make))
    grid = SteeringGrid(tuple(texts), strengths, sizes, {one.id: one.reference for one in examples}, manifest)
    if out is not None:
        grid.save(out)
    return grid


def _write(
    model: HookedModel,
    example: Example,
    *,
    rule: str,
    settings: Sequence[tuple[float, int]],
    sets: Mapping[int, Any],
    config: PromptConfig,
    length: int,
    style: StyleMeasure | None,
    alternatives: int,
) -> dict[str, Tensor]:
    prompt = build_prompt(model, example, config=config)
    heads = [sets[k or min(sets)] for _, k in settings]
    written: Any = generate(
        model,
        [prompt] * len(settings),
        heads=heads,
        gamma=[gamma for gamma, _ in settings],
        rule=rule,
        max_new_tokens=length,
        keep_alternatives=alternatives,
    )
    none = build_prompt(model, example, "none", config=config)
    answers = {str(index): without_special(model, tokens) for index, tokens in enumerate(written.tokens)}
    rows = measured(model, example, answers, fluency(model, none, list(answers.values())).tolist(), style)
    names = (*metrics_of(example.task), "style", "NLL", "repeated")
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
