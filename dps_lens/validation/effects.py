"""SetEffects: what ablating or patching sets of heads does, family by family, beside random sets."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.errors import ScoreError
from dps_lens.heads import HeadSet
from dps_lens.literals import CONDITIONS
from dps_lens.result import Result
from dps_lens.stats.intervals import (
    add_one_p,
    columns,
    crossed_interval,
    interval,
    range_of_next,
    ratio_interval,
    sets_for_p,
    sets_for_range,
    user_means,
)
from dps_lens.stats.skew import caveat, skewness_of

if TYPE_CHECKING:
    import pandas

Share: TypeAlias = Literal["all", "copied", "rest"]
FULL = "full model"
_NOTHING = {"mean": float("nan"), "low": float("nan"), "high": float("nan")}


class Measure(NamedTuple):
    """A sum of changes of NLL over conditions, and the gain that it is a part of.

    Attributes:
        weights: condition → weight of its change under the edit.
        gain: condition → weight of its NLL in the full model; empty where no share is defined.
        left: count what is left of the gain instead of what is gone.
    """

    weights: Mapping[str, float]
    gain: Mapping[str, float]
    left: bool = False


_GAIN = {"no_profile": 1.0, "own": -1.0}
_GAIN_OTHER = {"other_user": 1.0, "own": -1.0}
MEASURES = {
    "gain_removed": Measure({"own": 1.0, "no_profile": -1.0}, _GAIN),
    "gain_left": Measure({"own": 1.0, "no_profile": -1.0}, _GAIN, left=True),
    "gain_removed_other": Measure({"own": 1.0, "other_user": -1.0}, _GAIN_OTHER),
    "gain_left_other": Measure({"own": 1.0, "other_user": -1.0}, _GAIN_OTHER, left=True),
    "task_cost": Measure({"no_profile": 1.0}, {}),
    "neutral_cost": Measure({"neutral": 1.0}, {}),
    "necessity": Measure({"noising": 1.0}, _GAIN),
    "sufficiency": Measure({"denoising": -1.0}, _GAIN),
    "recovered": Measure({"vector": -1.0}, _GAIN),
    "recovered_other": Measure({"vector_other": -1.0}, _GAIN),
    "necessity_other": Measure({"noising_other": 1.0}, _GAIN_OTHER),
    "sufficiency_other": Measure({"denoising_other": -1.0}, _GAIN_OTHER),
}


@dataclass(frozen=True, eq=False, repr=False)
class SetEffects(Result):
    """Changes of NLL when sets of heads are edited, nats per token, of `ablation_curve` or `patch_heads`.

    The last axis of every tensor is (all tokens, copied tokens): the second counts only response tokens that
    continue an n-gram of the user's profile, divided by all tokens, so that copied + rest = all.

    Attributes:
        families: names.
        ks: sizes of the sets.
        user_ids: owner of each example.
        example_ids: one a row.
        full: condition → `Float64[Tensor, "example 2"]`, NLL of the unedited model.
        chosen: condition → `Float64[Tensor, "example family k 2"]`, NLL edited − unedited.
        draws: condition → `Float64[Tensor, "draw user family k 2"]`, the same for random sets. Where
            `manifest["spread"]` is true, draw d is measured on example `d mod n` of a user's n; else it is the mean
            over all of them.
        manifest: settings and rankings.
    """

    stem: ClassVar[str] = "effects"
    figure: ClassVar[str] = "ablation"

    families: tuple[str, ...]
    ks: tuple[int, ...]
    user_ids: tuple[str, ...]
    example_ids: tuple[str, ...]
    full: dict[str, Float64[Tensor, "example 2"]]
    chosen: dict[str, Float64[Tensor, "example family k 2"]]
    draws: dict[str, Float64[Tensor, "draw user family k 2"]]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def measures(self) -> tuple[str, ...]:
        """Measures that these conditions allow."""
        return tuple(name for name, measure in MEASURES.items() if {*measure.weights} <= {*self.chosen})

    def to_frame(self, *, part: Share = "all", level: float = 0.95) -> "pandas.DataFrame":
        """One row a family, k and measure.

        `gain_removed` is the part of the gain NLL(no profile) − NLL(own profile) that goes with the heads, `gain_left`
        the part that stays, `…_other` the same over another user's profile. `task_cost` is what the ablation costs the
        same task without a profile, `neutral_cost` what it costs on text that has nothing to do with users.
        `necessity`: loss when the heads' z of a run without profile is patched in; `sufficiency`: what is recovered by
        patching the profile run's z into a run without profile. `recovered`: what adding the heads' mean output to a
        run without profile recovers; `recovered_other`, the mean output over another user's texts.

        `NLL, …` is the NLL itself under ablation; of another objective, it stands under its name.

        Columns: `mean`, `low`, `high` (Student's t over users); `percent…` of the gain (Fieller over users, NaN
        where the gain's interval spans 0); `skewness` over users, at which those intervals fall short; `control`, the
        mean of the random sets over the same examples, with `control_low` and `control_high`, between which one more
        random set of the same users lies with probability `level`; `difference` from their mean, its interval over
        users and draws; `p`, the share of random sets that do as much, and `p_less`, that do as little, one-sided and
        counting the chosen set itself. 95% needs 39 random sets for the range and 19 for a p; with fewer there is none.
        `controls` says whether the random sets are of the `same layers`, or partly of the `nearest layers` where a
        layer has too few other heads.

        Args:
            part: `"all"` tokens, the `"copied"` ones, or the `"rest"`; the two add up to all.
            level: of the intervals.
        """
        import pandas as pd

        rows = self._full_rows(part, level)
        for index, family in enumerate(self.families):
            for position, k in enumerate(self.ks):
                about = {"family": family, "k": k}
                for name in self.measures:
                    rows.append(about | {"measure": name} | self._row(MEASURES[name], index, position, part, level))
                for name in (name for name in CONDITIONS if name in self.full and name in self.chosen):
                    values = self.full[name] + self.chosen[name][:, index, position]
                    of_users = self._users({name: values}, {name: 1.0}, part)
                    rows.append(about | {"measure": f"{self.loss}, {name}", **interval(of_users, level)})
        return pd.DataFrame(rows)

    def _full_rows(self, part: Share, level: float) -> list[dict[str, Any]]:
        known = [name for name in CONDITIONS if name in self.full]
        conditions: dict[str, Mapping[str, float]] = {f"{self.loss}, {name}": {name: 1.0} for name in known}
        if "no_profile" in self.full:
            conditions["gain"] = _GAIN
        if "other_user" in self.full:
            conditions["gain_other"] = _GAIN_OTHER
        return [
            {"family": FULL, "k": 0, "measure": name, **interval(self._users(self.full, weights, part), level)}
            for name, weights in conditions.items()
        ]

    def _row(self, measure: Measure, family: int, k: int, part: Share, level: float) -> dict[str, Any]:
        chosen = {name: values[:, family, k] for name, values in self.chosen.items()}
        values = self._users(chosen, measure.weights, part)
        gain = self._users(self.full, measure.gain, part) if measure.gain else None
        if measure.left and gain is not None:
            values = gain - values
        row: dict[str, Any] = interval(values, level)
        percent = ratio_interval(values, gain, level) if gain is not None else _NOTHING
        row |= columns("percent", {name: 100 * value for name, value in percent.items()})
        row["skewness"] = skewness_of(values)
        if not self.draws or not all(name in self.draws for name in measure.weights):
            return row
        random = self._random(measure, family, k, part)
        if measure.left and gain is not None:
            random = gain - random
        row |= {"control": float(random.mean()), "controls": self._controls(family, k)}
        row |= columns("difference", crossed_interval(values - random, level))
        means = random.mean(1)
        if len(random) >= sets_for_p(level):
            p = add_one_p(values.mean(), means), add_one_p(-values.mean(), -means)
            row |= dict(zip(("p_less", "p") if measure.left else ("p", "p_less"), p, strict=True))
        if len(random) >= sets_for_range(level):
            row |= dict(zip(("control_low", "control_high"), range_of_next(means, level), strict=True))
        return row

    def _levelled(self, draws: Float[np.ndarray, "draw user"]) -> Float[np.ndarray, "draw user"]:
        """Random sets as if each had been measured on all of a user's examples.

        An example's level, the mean of the draws on it, is replaced by the mean level of the user's examples;
        what is left of a draw is widened by `√(m / (m − 1))` for the m draws that the level was taken from.
        """
        levelled = np.empty_like(draws)
        for column, user in enumerate(dict.fromkeys(self.user_ids)):
            n = self.user_ids.count(user)
            of_example = [draws[start::n, column] for start in range(min(n, len(draws)))]
            level = np.mean([own.mean() for own in of_example])
            for start, own in enumerate(of_example):
                widen = (len(own) / (len(own) - 1)) ** 0.5 if len(own) > 1 else 0.0
                levelled[start::n, column] = level + (own - own.mean()) * widen
        return levelled

    def _controls(self, family: int, k: int) -> str:
        """Whether every layer has as many other heads as the chosen set holds there."""
        n_heads = self.manifest["model"]["n_heads"]
        for sets in self.manifest["sets"][self.families[family]].values():
            layers = Counter(head.layer for head in HeadSet.parse(sets[k]))
            if any(2 * count > n_heads for count in layers.values()):
                return "nearest layers"
        return "same layers"

    def _users(self, tensors: Mapping[str, Tensor], weights: Mapping[str, float], part: Share) -> np.ndarray:
        return user_means(_sum(tensors, weights, part), self.user_ids)

    @property
    def loss(self) -> str:
        """What was measured."""
        objective = self.manifest.get("objective", "nll")
        name = objective["name"] if isinstance(objective, dict) else str(objective)
        return "NLL" if name == "nll" else name

    def summary(self) -> str:
        k = ", ".join(map(str, self.ks))
        found = f"{len(self.user_ids)} examples of {len(set(self.user_ids))} users; {', '.join(self.families)}; K = {k}"
        return "; ".join([found, f"{self.n_random} random sets", *([self.no_range] if self.no_range else [])])

    @property
    def n_random(self) -> int:
        """Random sets of every family and K."""
        return len(next(iter(self.draws.values()), ()))

    @property
    def no_range(self) -> str:
        """Why there is no range of random sets at 95%; empty where there is one, or no random set."""
        needed = sets_for_range(0.95)
        return f"a 95% range of random sets needs {needed}" if 0 < self.n_random < needed else ""

    def sets(self, family: str | None = None, k: int | None = None) -> dict[str, HeadSet]:
        """The heads that each user was tested with; of the first family and the largest K by default."""
        family, k = self._which(family, k)
        place = self.ks.index(k)
        by_user = self.manifest["sets"][family]
        return {user: HeadSet.parse(sets[place], label=family) for user, sets in by_user.items()}

    def _which(self, family: str | None, k: int | None) -> tuple[str, int]:
        family, k = family or self.families[0], self.ks[-1] if k is None else k
        if family not in self.families or k not in self.ks:
            raise ScoreError(
                f"these effects hold no family {family!r} with K = {k}; families are {', '.join(self.families)}, and K "
                f"{', '.join(map(str, self.ks))}"
            )
        return family, k

    def beside_random(self, family: str | None = None, k: int | None = None, level: float = 0.95) -> "pandas.DataFrame":
        """One set, its random sets and their difference: `ablated`, `measure`, `mean`, `low`, `high`.

        Random rows are means over the sets; `difference` has its interval over users and sets. Of the first family and
        the largest K by default.
        """
        import pandas as pd

        family, k = self._which(family, k)
        place = (self.families.index(family), self.ks.index(k))
        rows = [
            {"ablated": FULL, "measure": row["measure"], **{end: row[end] for end in ("mean", "low", "high")}}
            for row in self._full_rows("all", level)
        ]
        gain = self._users(self.full, _GAIN, "all")
        shown, difference = f"top {k} heads", []
        for name, label in (("gain_left", "gain"), ("gain_removed", "gain_removed"), ("task_cost", "task_cost")):
            measure = MEASURES[name]
            chosen = self._users({c: v[:, place[0], place[1]] for c, v in self.chosen.items()}, measure.weights, "all")
            chosen = gain - chosen if measure.left else chosen
            rows.append({"ablated": shown, "measure": label, **interval(chosen, level)})
            if not self.draws:
                continue
            draws = self._random(measure, *place, "all")
            draws = gain - draws if measure.left else draws
            random = f"{len(draws)} random sets"
            difference.append({"ablated": random, "measure": label, **interval(draws.mean(0), level)})
            if not measure.left:
                rest = crossed_interval(chosen - draws, level)
                difference.append({"ablated": "difference", "measure": label, **rest})
        return pd.DataFrame([*rows, *sorted(difference, key=lambda row: row["ablated"] == "difference")])

    def _random(self, measure: Measure, family: int, k: int, part: Share) -> Float[np.ndarray, "draw user"]:
        """What random sets do, as if each had been measured on all of a user's examples."""
        draws = {name: of_sets[:, :, family, k] for name, of_sets in self.draws.items()}
        random = _sum(draws, measure.weights, part).numpy()
        return self._levelled(random) if self.manifest.get("spread", True) else random

    def verdict(self, family: str | None = None, k: int | None = None, level: float = 0.95) -> str:
        """The sentences that the numbers support about one family and K, the first and the largest by default.

        "More than random heads" needs both an interval over users and draws above 0 and `p` of at most `1 − level`,
        "less" an interval below 0 and such a `p_less`. Each sentence is a one-sided test, which holds that level where
        the chosen set is just one more random set: the interval alone would not, as it is about the mean of all sets.

        Raises:
            ScoreError: no such family or K, or effects of another kind.
        """
        if self.loss != "NLL":
            return f"These are changes of {self.loss!r}; what they say is in the numbers alone."
        if not {"gain_removed", "task_cost"} <= {*self.measures}:
            raise ScoreError(
                "verdict: it is about the gain that an ablation takes, as of ablation_cost; these effects hold "
                f"{', '.join(self.measures)}"
            )
        family, k = self._which(family, k)
        at = self.families.index(family), self.ks.index(k)
        gain = interval(self._users(self.full, _GAIN, "all"), level)
        removed, cost = (self._row(MEASURES[name], *at, "all", level) for name in ("gain_removed", "task_cost"))
        if math.isnan(gain["low"]):
            return "One user gives no interval over users, so nothing is claimed."
        if not gain["low"] > 0:
            return f"Here the profile does not reliably help the model (gain {_said(gain)}); there is little to remove."
        if not {"own", "no_profile"} <= {*self.draws} and self.draws:
            return "Random sets were not measured both with and without the own profile, so nothing is claimed."
        if self.n_random < (needed := sets_for_p(level)):
            return (
                f"The profile helps the model (gain {_said(gain)}); {self.n_random} random sets are too few to claim "
                f"anything of these heads at {level:.0%}, {needed} are needed."
            )
        said = _compared(f"the {k} heads of {family!r}", removed, cost, 1 - level)
        return " ".join([*said, caveat(np.array(removed["skewness"]), len(set(self.user_ids)))]).strip()


def _compared(shown: str, removed: Mapping[str, Any], cost: Mapping[str, Any], alpha: float) -> list[str]:
    """What a set takes and costs beside random sets, a sentence each."""
    by = _said(removed, "difference")
    takes = {
        1: f"More of the gain goes with {shown} than with random heads of the same layers, by {by}.",
        0: f"Of the gain, {shown} cannot be told from random heads of the same layers ({by}).",
        -1: f"Less of the gain goes with {shown} than with random heads of the same layers ({by}).",
    }
    by = _said(cost, "difference")
    costs = {
        1: f"They also cost the same task without a profile more than random heads do ({by}).",
        0: f"What they cost the task without a profile cannot be told from what random heads cost ({by}).",
        -1: f"They cost the same task without a profile less than random heads do ({by}).",
    }
    return [takes[_beside(removed, alpha)], costs[_beside(cost, alpha)]]


def _beside(row: Mapping[str, Any], alpha: float) -> int:
    """1 where the chosen set does more than random ones, −1 where it does less, 0 where neither can be told."""
    if row["difference_low"] > 0 and row["p"] <= alpha + 1e-12:
        return 1
    return -int(row["difference_high"] < 0 and row["p_less"] <= alpha + 1e-12)


def _said(row: Mapping[str, Any], name: str = "") -> str:
    mean, low, high = (row[key] for key in ((name, f"{name}_low", f"{name}_high") if name else ("mean", "low", "high")))
    return f"{mean:.3f} nats per token, interval {low:.3f} to {high:.3f}"


def _sum(tensors: Mapping[str, Tensor], weights: Mapping[str, float], part: Share) -> Tensor:
    return torch.stack([weight * _part(tensors[name], part) for name, weight in weights.items()]).sum(0)


def _part(values: Float64[Tensor, "*rest 2"], part: Share) -> Float64[Tensor, "*rest"]:
    if part == "rest":
        return values[..., 0] - values[..., 1]
    if part not in ("all", "copied"):
        raise ScoreError(f"to_frame: part {part!r} is unknown; use 'all', 'copied' or 'rest'")
    return values[..., 0 if part == "all" else 1]
