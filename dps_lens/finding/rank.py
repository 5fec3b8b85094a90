"""`"rank"`: the top of the integrated scores, less what they cost without a profile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_number
from dps_lens.errors import ScoreError
from dps_lens.finding.finder import Bounds, Finder, Fit
from dps_lens.finding.sets import Weighted, best, limits
from dps_lens.finding.trial import Trial


@dataclass(frozen=True)
class Rank(Finder):
    """The k heads of largest `score − μ · cost`, heads at or below 0 left out.

    The score is the integrated gradient (arXiv 1703.01365) along the path from the own run to the counterfactual one.
    The cost is the integrated gradient of zeroing all heads in the same task without a profile, and on neutral text,
    each where it is bounded, and where its mean over users is positive. μ is the smallest of `penalties` whose set
    keeps the bounds when it is measured as a whole; without bounds it is 0. Where none does, the longest beginning of
    the ranking by the last μ that does is returned, which may be empty.

    Attributes:
        penalties: what μ is chosen from, in rising order.
    """

    name: ClassVar[str] = "rank"
    penalties: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

    def __post_init__(self) -> None:
        for penalty in self.penalties:
            check_number(ScoreError, "Rank: penalties", penalty, least=0)
        if not self.penalties or sorted(self.penalties) != list(self.penalties):
            raise ScoreError(f"Rank: penalties {self.penalties} are not in rising order; give at least one")

    def fit(
        self, trials: Sequence[Trial], weights: Float[Tensor, "fit trial"], k: int, bounds: Bounds, seed: int
    ) -> list[Fit]:
        return [self._fit(weighted, k, bounds) for weighted in Weighted.rows(trials, weights)]

    def _fit(self, trials: Weighted, k: int, bounds: Bounds) -> Fit:
        score, bounded = trials.path("necessity"), limits(bounds)
        if not bounded:
            return Fit(best(score, k, positive=True), score.float())
        cost = sum((trials.path(name).clamp(min=0) for name in bounded), score.new_zeros(()))
        ranked = [score - penalty * cost for penalty in self.penalties]
        sets = [best(values, k, positive=True) for values in ranked]
        # One at a time: on a CPU a batch of neutral texts is no cheaper, and most often an early one is kept.
        for heads, values in zip(sets, ranked, strict=True):
            if len(heads) and trials.keeps([heads], bounds)[0]:
                return Fit(heads, values.float())
        for heads, values in zip(reversed(sets), reversed(ranked), strict=True):
            shorter = [heads[:size] for size in range(len(heads) - 1, 0, -1)]
            kept = [one for one, keeps in zip(shorter, trials.keeps(shorter, bounds), strict=True) if keeps]
            if kept:
                return Fit(kept[0], values.float())
        return Fit(sets[-1][:0], ranked[-1].float())
