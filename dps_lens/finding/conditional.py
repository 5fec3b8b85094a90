"""`"conditional"`: heads whose effect shows once others are gone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_number, check_whole
from dps_lens.errors import ScoreError
from dps_lens.finding.finder import Bounds, Finder, Fit
from dps_lens.finding.greedy import first_kept
from dps_lens.finding.sets import Weighted, best
from dps_lens.finding.trial import Trial
from dps_lens.heads import HeadSet


@dataclass(frozen=True)
class Conditional(Finder):
    """Adds, one at a time, the head whose effect is largest once the set so far is gone.

    From Conditional Co-Ablation (Gong et al. 2026, arXiv 2607.01940) are the two ideas: the seed S comes from any
    first-order method, and what is left is scored by how much its ablation effect *grows* once S is ablated, so that a
    dormant backup, which has no effect on the intact model, differs from a dead head. They score once, with one S, in
    the Fisher metric of the output distribution, to complete a circuit.

    Ours are: the effect itself, `L(S ∪ h) − L(S)` with L the NLL of the user's own text, so that heads which add up
    count beside those that grow (`by="growth"` subtracts `L(h) − L(∅)`, as they do); patches from the counterfactual
    run in place of ablations; the seed, which is the head of the largest integrated score; the repetition with a
    growing S up to k heads; and the bounds. It ends when no head that keeps the bounds adds `least`. Of three heads
    that stand in for each other, it does not see the other two when one is gone.

    Attributes:
        by: `"effect"` given the set, or its `"growth"`.
        all_rounds: so many heads after the seed are chosen out of all, for a backup may show in no score.
        candidates: heads that are tried afterwards, those of the largest effect when all were.
        least: of `by`, nats per token.
    """

    name: ClassVar[str] = "conditional"
    n_bootstraps: ClassVar[int] = 4
    together: ClassVar[int | None] = 5
    by: Literal["effect", "growth"] = "effect"
    all_rounds: int = 1
    candidates: int = 30
    least: float = 1e-4

    def __post_init__(self) -> None:
        if self.by not in ("effect", "growth"):
            raise ScoreError(f"Conditional: by {self.by!r} is unknown; use 'effect' or 'growth'")
        check_whole(ScoreError, "Conditional: all_rounds", self.all_rounds, least=0)
        check_whole(ScoreError, "Conditional: candidates", self.candidates, least=1)
        check_number(ScoreError, "Conditional: least", self.least, least=0)

    def fit(
        self, trials: Sequence[Trial], weights: Float[Tensor, "fit trial"], k: int, bounds: Bounds, seed: int
    ) -> list[Fit]:
        return [self._fit(weighted, k, bounds) for weighted in Weighted.rows(trials, weights)]

    def _fit(self, trials: Weighted, k: int, bounds: Bounds) -> Fit:
        values = trials.path("necessity")
        everything = best(values, values.numel())
        seed = first_kept(trials, HeadSet(shape=trials.shape), everything, _listed(values, everything), 0.0, bounds)
        chosen = seed if seed is not None else HeadSet(shape=trials.shape)
        given = float(trials.measured("necessity", [chosen])[0]) if len(chosen) else 0.0
        while 0 < len(chosen) < k:
            pool = everything if len(chosen) <= self.all_rounds else best(values, self.candidates + len(chosen))
            left = pool - chosen
            if not len(left):
                break
            effects = trials.measured("necessity", [chosen | HeadSet([head]) for head in left]) - given
            added = effects
            if self.by == "growth":
                added = effects - trials.measured("necessity", [HeadSet([head]) for head in left])
            for head, one in zip(left, added.tolist(), strict=True):
                values[head] = one
            found = first_kept(trials, chosen, left, added, self.least, bounds)
            if found is None:
                break
            given += float(effects[left.heads.index(found[0])])
            chosen = chosen | found
        return Fit(chosen, values.float())


def _listed(values: Tensor, heads: HeadSet) -> Tensor:
    return values[[head.layer for head in heads], [head.head for head in heads]]
