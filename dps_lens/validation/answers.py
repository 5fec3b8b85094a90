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

from dps_lens.checks import check_whole
from dps_lens.data import Example, PromptConfig, User
from dps_lens.data.conditions import DONORS, check_same_answers, prompts_in
from dps_lens.data.examples import held_out_examples, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.errors import ScoreError
from dps_lens.literals import AGAINST
from dps_lens.model import HookedModel
from dps_lens.result import Result
from dps_lens.scoring import AnswersRun, Choice, example_run
from dps_lens.scoring.ranks import measures_of_ranks
from dps_lens.scoring.work import ExampleWork
from dps_lens.stats.intervals import interval, user_means
from dps_lens.work import BatchSize, Engine, Run, RunConfig

if TYPE_CHECKING:
    import pandas


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
    same prompt. `.to_frame()` gives accuracy beside chance, margin and overconfidence.

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
        PromptError: two answers of an example are the same, cut to `response_tokens`, or one is empty or too long.
        RunError: `out` holds a run with other settings.
    """
    check_whole(ScoreError, "rank_answers: n_donors", n_donors, least=0)
    run = Run(model, AnswerRanks, out, engine, run_config)
    work = _Ranking(
        model, list(users), n_donors, max_examples, prompt_config or PromptConfig(), seed, run.config.batch_size
    )
    run.open(work.fingerprint)
    units = run.units(work, list(work.by_key), "ranking answers").made
    examples = [work.by_key[key] for key in units]
    most = max(len(unit["length"]) for unit in units.values())
    names = sorted({name for unit in units.values() for name in unit}, key=_place)
    # Examples may have other numbers of answers, and of donors.
    padded = {name: torch.full((len(units), most), torch.nan, dtype=torch.float64) for name in names}
    for row, unit in enumerate(units.values()):
        for name, values in unit.items():
            padded[name][row, : len(values)] = values
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


def _place(name: str) -> tuple[int, str]:
    """Conditions in their order."""
    order = ("own", *AGAINST, "length")
    return order.index(name.split(".", maxsplit=1)[0]), name


@dataclass
class _Ranking(ExampleWork):
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
        answers; `margin`: log-probability of the own answer beyond the mean of the rejected ones. Of whole answers,
        whatever `per_token` says, as their probabilities are: `probability` of the own answer among them, and
        `overconfidence`, the probability of the likeliest answer minus how often that is the own one, 0 for a
        calibrated model.

        Columns: `mean`, `low`, `high`, Student's t over users, and `unit`.

        Args:
            per_token: compare means over the tokens of an answer, as in `Pair`; else log-probabilities of whole
                answers.
            level: of the intervals.
        """
        import pandas as pd

        units = {"margin": "nats per token" if per_token else "nats"}
        rows: list[dict[str, Any]] = []
        of_users: dict[tuple[str, str], np.ndarray] = {}

        def add(condition: str, measure: str, values: np.ndarray) -> None:
            about = {"condition": condition, "measure": measure, **interval(values, level)}
            rows.append(about | {"unit": units.get(measure, "share")})

        for condition in self.conditions:
            for measure, values in self._measured(condition, per_token).items():
                of_users[condition, measure] = user_means(torch.from_numpy(values), self.user_ids)
                add(condition, measure, of_users[condition, measure])
        for other in self.conditions[1:]:
            for measure in ("accuracy", "margin", "probability"):
                add(f"own − {other}", measure, of_users["own", measure] - of_users[other, measure])
        return pd.DataFrame(rows)

    def by_user(self, measure: str = "margin", *, per_token: bool = True) -> "pandas.DataFrame":
        """One row a user, one column a condition, of a measure of `to_frame`.

        Raises:
            ScoreError: there is no such measure.
        """
        import pandas as pd

        found = {condition: self._measured(condition, per_token) for condition in self.conditions}
        if measure not in found["own"]:
            raise ScoreError(f"by_user: measure {measure!r} is unknown; use one of {', '.join(found['own'])}")
        means = {name: user_means(torch.from_numpy(of[measure]), self.user_ids) for name, of in found.items()}
        return pd.DataFrame({"user": list(dict.fromkeys(self.user_ids)), **means})

    @property
    def conditions(self) -> list[str]:
        """What prompts showed, the own profile first."""
        return list(dict.fromkeys(name.split(".")[0] for name in sorted(self.nll, key=_place)))

    def _measured(self, condition: str, per_token: bool) -> dict[str, Float[np.ndarray, " example"]]:
        """Every measure of every example, a mean over donors."""
        found: dict[str, list[np.ndarray]] = {}
        for nll in (nll for name, nll in self.nll.items() if name.split(".")[0] == condition):
            for name, values in measures_of_ranks(nll.numpy(), self.length.numpy(), per_token=per_token).items():
                found.setdefault(name, []).append(values)
        return {name: np.nanmean(rows, axis=0) for name, rows in found.items()}
