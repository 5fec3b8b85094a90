"""Which of several answers a model prefers: with the user's own profile, without one, with another user's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.data import Example, PromptConfig, User
from dps_lens.data.conditions import DONORS, check_same_answers, prompts_in
from dps_lens.data.examples import by_key, held_out_examples, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.literals import AGAINST
from dps_lens.model import HookedModel, Runner, runner_of
from dps_lens.result import Result
from dps_lens.scoring import AnswersRun, Choice, example_run
from dps_lens.stats.intervals import interval, user_means
from dps_lens.work import BatchSize, Engine, Run, RunConfig, Work

if TYPE_CHECKING:
    import pandas

_BINS, _RESAMPLES = 10, 1000


def rank_answers(
    model: HookedModel,
    users: Sequence[User],
    *,
    n_donors: int = DONORS,
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> "AnswerRanks":
    """How likely a model finds the user's own answer beside the rejected ones, on evaluation examples.

    Each example is read with the user's own profile, without one, and with other users'; all of its answers follow the
    same prompt. `.to_frame()` gives accuracy beside chance, margin and calibration.

    Args:
        model: a hooked model.
        users: with pairs or choices, as `load_users` reads them or `make_pairs` makes them.
        n_donors: other users whose profiles stand in for the own one, drawn with `seed`; with one user, none.
        max_examples: the newest so many evaluation examples of each user.
        prompt_config: how prompts are built.
        seed: of the other users that are drawn.
        out: a run folder; a run that is started again there resumes.
        engine: as in `score_heads`.
        run_config: force, progress bars.

    Raises:
        ScoreError: an example has no rejected answer.
        PromptError: two answers of an example begin alike for `response_tokens`.
        RunError: `out` holds a run with other settings.
    """
    run = Run(model, AnswerRanks, out, engine, run_config)
    work = _Ranking(
        model, list(users), n_donors, max_examples, prompt_config or PromptConfig(), seed, run.config.batch_size
    )
    run.open(work.fingerprint)
    units = run.units(work, list(work.by_key), "ranking answers").made
    examples = [work.by_key[key] for key in units]
    most = max(len(unit["length"]) for unit in units.values())
    padded = {
        name: torch.stack([torch.nn.functional.pad(unit[name], (0, most - len(unit[name])), value=torch.nan)
                           for unit in units.values()])
        for name in next(iter(units.values()))
    }  # fmt: skip
    length = padded.pop("length")
    return run.keep(
        AnswerRanks(
            padded,
            length,
            user_ids=tuple(example.user_id for example in examples),
            example_ids=tuple(example.id for example in examples),
            manifest=run.manifest,
        )
    )


@dataclass
class _Ranking(Work):
    """The run of `rank_answers`."""

    model: HookedModel
    users: list[User]
    n_donors: int
    max_examples: int | None
    prompt_config: PromptConfig
    seed: int
    batch_size: BatchSize

    @cached_property
    def examples(self) -> list[Example]:
        return held_out_examples("rank_answers", self.users, self.max_examples)

    @cached_property
    def by_key(self) -> dict[str, Example]:
        return by_key(self.examples)

    @cached_property
    def runner(self) -> Runner:
        return runner_of(self.model)

    def owner(self, key: str) -> str:
        return self.by_key[key].user_id

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """Mean NLL of every answer `[answer]` by condition, and the answers' tokens, `length`."""
        example = self.by_key[key]
        options: dict[str, Any] = {"n_donors": self.n_donors, "seed": self.seed, "config": self.prompt_config}
        prompts = {name: prompts_in(self.model, example, name, self.users, **options) for name in ("own", *AGAINST)}
        check_same_answers([prompt for of_name in prompts.values() for prompt in of_name])
        unit: dict[str, Tensor] = {}
        for name, of_name in prompts.items():
            rows = []
            for prompt in of_name:
                run = example_run(self.runner, prompt, objective=Choice(), batch_size=self.batch_size)
                assert isinstance(run, AnswersRun)
                rows.append(torch.tensor([one.nll for one in run.runs], dtype=torch.float64))
                unit["length"] = torch.tensor([float(len(one.targets)) for one in run.runs], dtype=torch.float64)
            if rows:
                # Donors stay apart: a mean of NLLs would be no model's.
                unit |= {f"{name}.{place}" if place else name: row for place, row in enumerate(rows)}
        return unit

    def fingerprint(self) -> dict[str, Any]:
        return {
            "call": "rank_answers",
            "n_donors": self.n_donors,
            "max_examples": self.max_examples,
            "seed": self.seed,
            **describe_inputs(self.model, self.users, self.examples, self.prompt_config),
            "examples": [unit_key(example) for example in self.examples],
        }


@dataclass(frozen=True, eq=False, repr=False)
class AnswerRanks(Result):
    """How likely every answer is, by what the prompt shows, of `rank_answers`.

    Attributes:
        nll: condition → `Float64[Tensor, "example answer"]`, mean NLL over the tokens of an answer, the user's own
            first; NaN where an example has fewer. `own`, `no_profile`, `other_user`, and `other_user.1`, … of further
            donors.
        length: `Float64[Tensor, "example answer"]`, tokens.
        user_ids: owner of each example.
        example_ids: one a row.
        manifest: settings.
    """

    stem: ClassVar[str] = "answers"

    nll: dict[str, Float64[Tensor, "example answer"]]
    length: Float64[Tensor, "example answer"]
    user_ids: tuple[str, ...] = field(kw_only=True)
    example_ids: tuple[str, ...] = field(kw_only=True)
    manifest: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def summary(self) -> str:
        return f"{len(self.user_ids)} examples of {len({*self.user_ids})} users"

    def to_frame(self, *, per_token: bool = True, level: float = 0.95) -> "pandas.DataFrame":
        """One row a condition and measure, and one for what the own profile adds: `own − no_profile`, ….

        `accuracy`: how often the user's own answer is the likeliest, ties shared; `chance`: one over the number of
        answers; `margin`: log-probability of the own answer beyond the mean of the rejected ones; `probability` of the
        own answer among them; `calibration`: by how much confidence and accuracy differ, the expected calibration error
        in ten bins (Guo et al. 2017, arXiv 1706.04599).

        Columns: `mean`, `low`, `high`: Student's t over users; of the calibration, which is no mean of users, the
        percentiles of 1,000 resamples of users.

        Args:
            per_token: compare means over the tokens of an answer, as in `Pair`; else log-probabilities of whole
                answers.
            level: of the intervals.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        of_users: dict[tuple[str, str], np.ndarray] = {}
        for condition, drawn in self._drawn(per_token).items():
            for measure, values in self._measured(drawn).items():
                means = of_users[condition, measure] = user_means(torch.from_numpy(values), self.user_ids)
                rows.append({"condition": condition, "measure": measure, **interval(means, level)})
            rows.append({"condition": condition, "measure": "calibration", **self._calibration(drawn, level)})
        for other in AGAINST:
            for measure in ("accuracy", "margin", "probability"):
                if (other, measure) in of_users:
                    added = of_users["own", measure] - of_users[other, measure]
                    rows.append({"condition": f"own − {other}", "measure": measure, **interval(added, level)})
        return pd.DataFrame(rows)

    def by_user(self, measure: str = "margin", *, per_token: bool = True) -> "pandas.DataFrame":
        """One row a user, one column a condition: `accuracy`, `chance`, `margin` or `probability`, as in `to_frame`."""
        import pandas as pd

        found = {
            condition: user_means(torch.from_numpy(self._measured(drawn)[measure]), self.user_ids)
            for condition, drawn in self._drawn(per_token).items()
        }
        return pd.DataFrame({"user": list(dict.fromkeys(self.user_ids)), **found})

    def _drawn(self, per_token: bool) -> dict[str, list[np.ndarray]]:
        """The log-probabilities of answers by condition, those of every donor apart."""
        found: dict[str, list[np.ndarray]] = {}
        for name, nll in self.nll.items():
            found.setdefault(name.split(".")[0], []).append(self._logits(nll, per_token))
        return found

    def _logits(self, nll: Tensor, per_token: bool) -> Float[np.ndarray, "example answer"]:
        return (-nll if per_token else -nll * self.length).numpy()

    @staticmethod
    def _measured(drawn: Sequence[np.ndarray]) -> dict[str, Float[np.ndarray, " example"]]:
        """Every measure of every example, a mean over donors."""
        found: dict[str, list[np.ndarray]] = {}
        for logits in drawn:
            best = logits == np.nanmax(logits, axis=1, keepdims=True)
            found.setdefault("accuracy", []).append(best[:, 0] / best.sum(1))
            found.setdefault("chance", []).append(1 / (~np.isnan(logits)).sum(1))
            found.setdefault("margin", []).append(logits[:, 0] - np.nanmean(logits[:, 1:], axis=1))
            found.setdefault("probability", []).append(_softmax(logits)[:, 0])
        return {name: np.mean(rows, axis=0) for name, rows in found.items()}

    def _calibration(self, drawn: Sequence[np.ndarray], level: float) -> dict[str, float]:
        confidence, right, owner = [], [], []
        for logits in drawn:
            shares = _softmax(logits)
            confidence.append(np.nanmax(shares, axis=1))
            best = logits == np.nanmax(logits, axis=1, keepdims=True)
            right.append(best[:, 0] / best.sum(1))
            owner.append(np.array(self.user_ids))
        confidence, right, owner = (np.concatenate(each) for each in (confidence, right, owner))  # type: ignore[assignment]
        users = list(dict.fromkeys(self.user_ids))
        rows = [np.flatnonzero(owner == user) for user in users]
        rng = np.random.default_rng(0)
        resampled = []
        for _ in range(_RESAMPLES if len(users) > 1 else 0):
            drawn_rows = np.concatenate([rows[one] for one in rng.integers(len(users), size=len(users))])
            resampled.append(_calibration_error(confidence[drawn_rows], right[drawn_rows]))
        low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2]) if resampled else (np.nan, np.nan)
        return {"mean": _calibration_error(confidence, right), "low": float(low), "high": float(high)}


def _softmax(logits: Float[np.ndarray, "example answer"]) -> Float[np.ndarray, "example answer"]:
    shares = np.exp(logits - np.nanmax(logits, axis=1, keepdims=True))
    return shares / np.nansum(shares, axis=1, keepdims=True)


def _calibration_error(confidence: Any, right: Any) -> float:
    places = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs((confidence - right)[places == place].sum()) for place in range(_BINS)]
    return float(sum(gaps) / len(confidence))
