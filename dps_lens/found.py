"""FoundHeads: a set of heads, how often resamples of users choose the same, and what it was measured to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.atlas import Atlas, atlas_of, published
from dps_lens.errors import HeadError, ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.result import Result
from dps_lens.scores import HeadScores, t_quantile

if TYPE_CHECKING:
    import pandas


class Inclusion(NamedTuple):
    """How many resamples of users chose a head.

    Attributes:
        chosen: so many.
        of: so many in all.
    """

    chosen: int
    of: int

    @property
    def frequency(self) -> float:
        """Share of the resamples."""
        return self.chosen / self.of

    def ci(self, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the share (1927), for resamples to come; users are those that were resampled."""
        if not 0 < level < 1:
            raise ScoreError(f"an interval's level is a share between 0 and 1, such as 0.95; found {level}")
        from scipy.stats import binomtest

        found = binomtest(self.chosen, self.of).proportion_ci(level, method="wilson")
        return float(found.low), float(found.high)


@dataclass(eq=False, repr=False)
class FoundHeads(Result):
    """The set of heads that `find_heads` found, usable wherever a family of heads is.

    `heads` is the set fitted to all users together; where the same users are tested, `of_user` gives each the set of a
    fit that left them out. Evidence comes from discovery examples: `effects` is measured on the examples that chose
    the set, and flatters it; `crossed` measures on each user's examples the set of a fit without that user, whose
    documents may still have stood in the profiles of donors.

    Attributes:
        heads: best first, at most k; its beginnings are the sets of smaller k, and were not all held to the bounds.
        values: `Float[Tensor, "layer head"]`, what the finder ranked by, fitted to all users.
        roles: of heads, where the finder tells them apart: `"facilitating"`, `"interfering"`, `"irrelevant"`.
        folds: user ids in groups; a fit left out each.
        by_fold: the sets of these fits.
        resampled: the sets of fits to users drawn with replacement.
        example_ids: one a row of the evidence.
        user_ids: one a row.
        effects: by measure `[example]`: `necessity` (patched from the counterfactual run, the set raises the NLL of the
            own text, or the objective of `FindConfig`, by so much), `sufficiency` (patched into the counterfactual run,
            it lowers it by so much), `task_cost` and `neutral_cost` (zeroed without a profile, and on neutral text, it
            raises the NLL, nats per token).
        crossed: the same of the fold's set; empty without folds.
        nll: of the unedited model, by condition `[example]`, nats per token: `own`, `against`, `no_profile`.
        manifest: model, data, settings and seeds.
    """

    stem: ClassVar[str] = "found"

    heads: HeadSet
    values: Float[Tensor, "layer head"]
    roles: Mapping[str, HeadSet] = field(default_factory=dict, kw_only=True)
    folds: Sequence[Sequence[str]] = field(default=(), kw_only=True)
    by_fold: Sequence[HeadSet] = field(default=(), kw_only=True)
    resampled: Sequence[HeadSet] = field(default=(), kw_only=True)
    example_ids: Sequence[str] = field(kw_only=True)
    user_ids: Sequence[str] = field(kw_only=True)
    effects: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    crossed: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    nll: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    manifest: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        self.example_ids, self.user_ids = tuple(self.example_ids), tuple(self.user_ids)
        self.folds = tuple(tuple(fold) for fold in self.folds)
        self.by_fold, self.resampled = tuple(self.by_fold), tuple(self.resampled)
        if len(self.example_ids) != len(self.user_ids):
            raise ScoreError(f"FoundHeads: {len(self.example_ids)} examples, {len(self.user_ids)} users")
        if len(self.folds) != len(self.by_fold):
            raise ScoreError(f"FoundHeads: {len(self.folds)} folds, {len(self.by_fold)} sets of folds")
        for name, values in {**self.effects, **self.crossed, **self.nll}.items():
            if tuple(values.shape) != (len(self.example_ids),):
                raise ScoreError(f"FoundHeads: {name} has not one value for each of {len(self.example_ids)} examples")

    def summary(self) -> str:
        task, neutral = (self._mean(name) for name in ("task_cost", "neutral_cost"))
        costs = "".join(
            f", {name} cost {value:.2f}" for name, value in (("task", task), ("neutral", neutral)) if value is not None
        )
        return f"{len(self.heads)} heads of {len(self.users)} users{costs}: {self.heads}"

    def _mean(self, name: str) -> float | None:
        return float(self._user_means(self.effects[name]).mean()) if name in self.effects else None

    @property
    def k(self) -> int:
        """At most so many heads were asked for; fits whose bounds or examples allow no more hold fewer."""
        return int(self.manifest.get("k", len(self.heads)))

    @property
    def users(self) -> tuple[str, ...]:
        """Whose examples chose the heads, in order of appearance."""
        return tuple(dict.fromkeys(self.user_ids))

    def of_user(self, user: str) -> HeadSet:
        """The set that a user is tested with: of the fit without the user's fold, or `heads` for strangers.

        Raises:
            ScoreError: the user's examples chose every set, for there are no folds.
        """
        for users, heads in zip(self.folds, self.by_fold, strict=True):
            if user in users:
                return heads
        if user in self.users:
            raise ScoreError(
                f"of_user: user {user!r} chose these heads, and no fit left the user out; find them with "
                "FindConfig(folds=True) and at least two users, or pass the set itself, found.heads"
            )
        return self.heads

    def top(self, k: int, user: str | None = None, *, label: str | None = None) -> HeadSet:
        """The first `k` heads, or those that a user is tested with.

        Raises:
            HeadError: the set holds fewer.
        """
        heads = self.heads if user is None else self.of_user(user)
        if not 0 <= k <= len(heads):
            raise HeadError(f"top: the set holds {len(heads)} heads, asked for {k}; lower k, or find more")
        return HeadSet(heads[:k], heads.label if label is None else label, heads.shape)

    @property
    def inclusion(self) -> dict[Head, Inclusion]:
        """How many resamples of users chose each head of the set and each head of theirs, most often first."""
        if not self.resampled:
            return {}
        counts = {head: sum(head in heads for heads in self.resampled) for heads in self._sets() for head in heads}
        ranked = sorted(counts, key=lambda head: (-counts[head], self._place(head), head))
        return {head: Inclusion(counts[head], len(self.resampled)) for head in ranked}

    def publish(self, folder: str | Path) -> Atlas:
        """Write a head atlas: the set, how often resamples of users chose each head, and the settings; no user's text
        or id. `load_atlas` reads it."""
        frequencies = {head: found.frequency for head, found in self.inclusion.items()}
        return published(
            atlas_of(
                self.heads,
                self.values,
                inclusion=frequencies,
                n_users=len(self.users),
                n_examples=len(self.example_ids),
                manifest=self.manifest,
            ),
            folder,
        )

    def _sets(self) -> tuple[HeadSet, ...]:
        return (self.heads, *self.by_fold, *self.resampled)

    def _place(self, head: Head) -> int:
        return self.heads.heads.index(head) if head in self.heads else len(self.heads)

    def _user_means(self, values: Tensor) -> Tensor:
        owners = self.user_ids
        rows = [[row for row, owner in enumerate(owners) if owner == user] for user in self.users]
        return torch.stack([values[own].double().mean() for own in rows])

    def evidence(self, level: float = 0.95) -> "pandas.DataFrame":
        """What the set was measured to do on discovery examples: a row a measure and sample, with the t interval.

        `"in-sample"` rows are of the examples that chose the set, and flatter it; `"crossed"` rows give each user the
        set of a fit without the user. Intervals are over users; NaN for a single one.
        """
        import pandas as pd

        rows = []
        for sample, values in (("in-sample", self.effects), ("crossed", self.crossed)):
            for name, each in values.items():
                means = self._user_means(each)
                n = len(means)
                half = float(t_quantile(n - 1, level) * means.std() / n**0.5) if n > 1 else float("nan")
                mean = float(means.mean())
                rows.append({"sample": sample, "measure": name, "mean": mean, "low": mean - half, "high": mean + half})
        return pd.DataFrame(rows, columns=["sample", "measure", "mean", "low", "high"])

    def to_frame(self, level: float = 0.95) -> "pandas.DataFrame":
        """One row a head that any fit chose: place in the set, value, role, inclusion with its interval, folds.

        Args:
            level: of the intervals of the inclusion frequency.
        """
        import pandas as pd

        inclusion, rows = self.inclusion, []
        for head in dict.fromkeys(head for heads in (self.heads, HeadSet(inclusion), *self._sets()) for head in heads):
            row: dict[str, Any] = {
                "name": str(head),
                "layer": head.layer,
                "head": head.head,
                "place": self._place(head) + 1 if head in self.heads else None,
                "value": float(self.values[head]),
                "role": next((role for role, heads in self.roles.items() if head in heads), ""),
            }
            if head in inclusion:
                low, high = inclusion[head].ci(level)
                row |= {"inclusion": inclusion[head].frequency, "low": low, "high": high}
            row["folds"] = sum(head in heads for heads in self.by_fold)
            rows.append(row)
        columns = ["name", "layer", "head", "place", "value", "role", "inclusion", "low", "high", "folds"]
        return pd.DataFrame(rows, columns=columns).astype({"place": "Int64"})


def load_heads(run: str | Path) -> HeadScores | FoundHeads:
    """What a run folder of `score_heads` or `find_heads` holds.

    Raises:
        ScoreError: it holds neither.
    """
    return FoundHeads.load(run) if (Path(run) / f"{FoundHeads.stem}.json").is_file() else HeadScores.load(run)
