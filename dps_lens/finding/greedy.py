"""`"greedy"`: forward selection of a set by what it does as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.checks import check_number, check_whole
from dps_lens.errors import ScoreError
from dps_lens.finding.finder import Bounds, Finder, Fit
from dps_lens.finding.sets import Weighted, best
from dps_lens.finding.trial import Trial
from dps_lens.heads import HeadSet

_AT_ONCE = 8


@dataclass(frozen=True)
class Greedy(Finder):
    """Adds, one at a time, the head with which the set gains most, of those with which it keeps its bounds.

    A set gains `(necessity + sufficiency) / 2`: what patching it takes from the own run, and what it brings to the
    counterfactual one. The second sees heads that stand in for each other, none of which is missed alone. It ends with
    k heads, or when no head that keeps the bounds adds `least`. Every beginning of the set keeps the bounds, too.

    Attributes:
        candidates: so many heads of the largest integrated scores are tried, at least k.
        least: what a head must add to the gain, nats per token.
    """

    name: ClassVar[str] = "greedy"
    n_bootstraps: ClassVar[int] = 9
    together: ClassVar[int | None] = 5
    candidates: int = 30
    least: float = 1e-4

    def __post_init__(self) -> None:
        check_whole(ScoreError, "Greedy: candidates", self.candidates, least=1)
        check_number(ScoreError, "Greedy: least", self.least, least=0)

    def fit(
        self, trials: Sequence[Trial], weights: Float[Tensor, "fit trial"], k: int, bounds: Bounds, seed: int
    ) -> list[Fit]:
        return [self._fit(weighted, k, bounds) for weighted in Weighted.rows(trials, weights)]

    def _fit(self, trials: Weighted, k: int, bounds: Bounds) -> Fit:
        pool = best(trials.path("necessity"), max(self.candidates, k))
        chosen, gain = HeadSet(shape=trials.shape), 0.0
        values = trials.path("necessity").new_zeros(trials.shape)
        while len(chosen) < k and len(chosen) < len(pool):
            left = pool - chosen
            gains = gain_of(trials, [chosen | HeadSet([head]) for head in left])
            for head, one in zip(left, gains.tolist(), strict=True):
                values[head] = one - gain
            found = first_kept(trials, chosen, left, gains - gain, self.least, bounds)
            if found is None:
                break
            chosen, gain = chosen | found, gain + float(values[found[0]])
        return Fit(chosen, values.float())


def gain_of(trials: Weighted, sets: Sequence[HeadSet]) -> Float64[Tensor, " set"]:
    """`(necessity + sufficiency) / 2` of each set, nats per token."""
    return (trials.measured("necessity", sets) + trials.measured("sufficiency", sets)) / 2


def first_kept(
    trials: Weighted,
    chosen: HeadSet,
    left: HeadSet,
    added: Float64[Tensor, " head"],
    least: float,
    bounds: Bounds,
) -> HeadSet | None:
    """The head that adds most, and more than `least`, of those with which the set keeps its bounds."""
    order = [index for index in (-added).argsort(stable=True).tolist() if added[index] > least]
    # Where bounds do not bind, the first one keeps them; where they do, a batch costs little more than one.
    for part in (order[:1], *(order[start : start + _AT_ONCE] for start in range(1, len(order), _AT_ONCE))):
        tried = [left[index : index + 1] for index in part]
        for head, kept in zip(tried, trials.keeps([chosen | head for head in tried], bounds), strict=True):
            if kept:
                return head
    return None
