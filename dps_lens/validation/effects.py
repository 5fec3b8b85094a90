"""SetEffects: what ablating or patching sets of heads does, family by family, beside random sets."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.errors import ScoreError
from dps_lens.heads import HeadSet
from dps_lens.literals import CONDITIONS
from dps_lens.result import Result
from dps_lens.scoring.objectives import measured_name
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
from dps_lens.stats.skew import skewness_of
from dps_lens.validation.measures import GAIN, GAIN_OTHER, MEASURES, TASK_COST_IN_NLL, Measure
from dps_lens.validation.verdict import REMOVED, TOLD, verdict

if TYPE_CHECKING:
    import pandas

Share: TypeAlias = Literal["all", "copied", "rest"]
FULL = "full model"
_NOTHING = {"mean": float("nan"), "low": float("nan"), "high": float("nan")}


@dataclass(frozen=True, eq=False, repr=False)
class SetEffects(Result):
    """Changes of NLL, or of another objective, when sets of heads are edited, of `ablation_curve` or `patch_heads`.

    The last axis of every tensor is (all tokens, copied tokens): the second counts only response tokens that
    continue an n-gram of the user's profile, divided by all tokens, so that copied + rest = all. Nothing is copied in
    numbers that compare several answers.

    Attributes:
        families: names.
        ks: sizes of the sets.
        user_ids: owner of each example.
        example_ids: one a row.
        full: condition → `Float64[Tensor, "example 2"]`, NLL of the unedited model. Where answers are compared, `task`
            is the NLL of the user's own answer without a profile.
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
        return tuple(name for name in MEASURES if {*self.measure(name).weights} <= {*self.chosen})

    def measure(self, name: str) -> Measure:
        """What a measure sums up; where answers are compared, the task's cost is that of the NLL."""
        return TASK_COST_IN_NLL if name == "task_cost" and "task" in self.chosen else MEASURES[name]

    def to_frame(self, *, part: Share = "all", level: float = 0.95) -> "pandas.DataFrame":
        """One row a family, k and measure.

        `gain_removed` is the part of the gain NLL(no profile) − NLL(own profile) that goes with the heads, `gain_left`
        the part that stays, `…_other` the same over another user's profile. Beside them the off-target costs:
        `task_cost` is what the ablation costs the same task without a profile, `neutral_cost` what it costs on text
        that has nothing to do with users.
        `necessity`: loss when the heads' z of a run without profile is patched in; `sufficiency`: what is recovered by
        patching the profile run's z into a run without profile; `…_other`: that run has another user's profile, as in
        `ablation_curve`. `recovered`: what adding the heads' vector to a run
        without profile recovers; `recovered_other`, the vector of another user, as in `vector_recovery`.

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
            part: `"all"` tokens, the `"copied"` ones, or the `"rest"`; the two add up to all. Where answers are
                compared there is `"all"` only.
            level: of the intervals.

        Raises:
            ScoreError: there is no such part.
        """
        import pandas as pd

        rows = self._full_rows(part, level)
        for index, family in enumerate(self.families):
            for position, k in enumerate(self.ks):
                about = {"family": family, "k": k}
                for name in self.measures:
                    rows.append(about | {"measure": name} | self._row(self.measure(name), index, position, part, level))
                for name in (name for name in CONDITIONS if name in self.full and name in self.chosen):
                    values = self.full[name] + self.chosen[name][:, index, position]
                    of_users = self._users({name: values}, {name: 1.0}, part)
                    rows.append(about | {"measure": self._named(name), **interval(of_users, level)})
        return pd.DataFrame(rows)

    def by_user(self, *, part: Share = "all") -> "pandas.DataFrame":
        """One row a user, family and k, for statistics of your own; the full model stands first, as k = 0.

        Columns: `user`, `family`, `k`; the measures of `to_frame`, a mean over the user's examples, and, as
        `random …`, their mean over random sets. Of the full model, `NLL, …`, `gain` and `gain_other`.

        Args:
            part: as in `to_frame`.
        """
        import pandas as pd

        users = list(dict.fromkeys(self.user_ids))
        full = {name: self._users(self.full, weights, part) for name, weights in self._of_full().items()}
        frames = [pd.DataFrame({"user": users, "family": FULL, "k": 0, **full})]
        for index, family in enumerate(self.families):
            for position, k in enumerate(self.ks):
                columns: dict[str, Any] = {"user": users, "family": family, "k": k}
                for name in self.measures:
                    columns[name] = self._chosen(self.measure(name), index, position, part)
                    random = self._random(self.measure(name), index, position, part)
                    if random is not None and len(random):
                        columns[f"random {name}"] = random.mean(0)
                frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def _of_full(self) -> dict[str, Mapping[str, float]]:
        """What is said of the full model, as weights of conditions."""
        known = [name for name in CONDITIONS if name in self.full]
        conditions: dict[str, Mapping[str, float]] = {self._named(name): {name: 1.0} for name in known}
        if "no_profile" in self.full:
            conditions["gain"] = GAIN
        if "other_user" in self.full:
            conditions["gain_other"] = GAIN_OTHER
        return conditions

    def _full_rows(self, part: Share, level: float) -> list[dict[str, Any]]:
        return [
            {"family": FULL, "k": 0, "measure": name, **interval(self._users(self.full, weights, part), level)}
            for name, weights in self._of_full().items()
        ]

    def _row(self, measure: Measure, family: int, k: int, part: Share, level: float) -> dict[str, Any]:
        values = self._chosen(measure, family, k, part)
        gain = self._users(self.full, measure.gain, part) if measure.gain else None
        row: dict[str, Any] = interval(values, level)
        percent = ratio_interval(values, gain, level) if gain is not None else _NOTHING
        row |= columns("percent", {name: 100 * value for name, value in percent.items()})
        row["skewness"] = skewness_of(values)
        if (random := self._random(measure, family, k, part)) is None:
            return row
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
        if part != "all" and self.compares:
            raise ScoreError(f"part {part!r}: {self.loss!r} compares answers, not tokens; use 'all'")
        return user_means(_sum(tensors, weights, part), self.user_ids)

    @property
    def compares(self) -> bool:
        """What was measured compares the answers of an example."""
        return bool(self.manifest.get("compares"))

    @property
    def loss(self) -> str:
        """What was measured."""
        return measured_name(self.manifest)

    def _named(self, condition: str) -> str:
        """What was measured in a condition; of neutral text, which has one answer, that is the NLL."""
        return f"{'NLL' if condition == 'neutral' and self.compares else self.loss}, {condition}"

    def unit_of(self, measure: str) -> str:
        """The unit of a measure, or of a condition of the full model; off-target costs are of the NLL."""
        costs = ("task_cost", "neutral_cost", "NLL, neutral")
        per_token = measure in costs and self.compares
        return "nats per token" if per_token else str(self.manifest.get("unit", "nats per token"))

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

    def _sizes(self, family: str, k: int) -> str:
        """How many heads users were tested with; bounds may keep the sets of some short."""
        sizes = {len(heads) for heads in self.sets(family, k).values()}
        return f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else str(sizes.pop())

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

        Every measure that is there; the gain that is left stands as `gain` and `gain_other`, as for the full model.
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
        shown, beside, difference = f"top {self._sizes(family, k)} heads", [], []
        for name in sorted(self.measures, key=lambda name: not MEASURES[name].left):
            measure, label = self.measure(name), name.replace("gain_left", "gain")
            chosen, random = self._chosen(measure, *place, "all"), self._random(measure, *place, "all")
            rows.append({"ablated": shown, "measure": label, **interval(chosen, level)})
            if random is None:
                continue
            beside.append(
                {"ablated": f"{len(random)} random sets", "measure": label, **interval(random.mean(0), level)}
            )
            if not measure.left:
                rest = crossed_interval(chosen - random, level)
                difference.append({"ablated": "difference", "measure": label, **rest})
        return pd.DataFrame([*rows, *beside, *difference])

    def _chosen(self, measure: Measure, family: int, k: int, part: Share) -> Float[np.ndarray, " user"]:
        """What the chosen sets do, a mean a user."""
        chosen = {name: values[:, family, k] for name, values in self.chosen.items()}
        values = self._users(chosen, measure.weights, part)
        return self._users(self.full, measure.gain, part) - values if measure.left else values

    def _random(self, measure: Measure, family: int, k: int, part: Share) -> Float[np.ndarray, "draw user"] | None:
        """What random sets do, as if each had been measured on all of a user's examples; None where they were not."""
        if not {*measure.weights} <= {*self.draws}:
            return None
        draws = {name: of_sets[:, :, family, k] for name, of_sets in self.draws.items()}
        random = _sum(draws, measure.weights, part).numpy()
        random = self._levelled(random) if self.manifest.get("spread", True) else random
        return self._users(self.full, measure.gain, part) - random if measure.left else random

    def verdict(self, family: str | None = None, k: int | None = None, level: float = 0.95) -> str:
        """The sentences that the numbers support about one family and K, the first and the largest by default.

        First what the set costs the same task without a profile, and neutral text; then what it removes of the gain
        over another user, and of that over no profile; then, where they were measured, patched necessity and
        sufficiency. Nothing is claimed of a gain that is not reliably above 0. Without another user, the verdict is
        about the gain over no profile, and says so.

        "More than random heads" needs both an interval over users and draws above 0 and `p` of at most `1 − level`,
        "less" an interval below 0 and such a `p_less`. Each claim is a one-sided test, which holds that level where
        the chosen set is just one more random set: the interval alone would not, as it is about the mean of all sets.
        The claims are not corrected for each other.

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
        rows = {name: self._row(self.measure(name), *at, "all", level) for name in TOLD if name in self.measures}
        gains = {
            name: interval(self._users(self.full, MEASURES[name].gain, "all"), level)
            for name in REMOVED
            if name in rows
        }
        return verdict(
            f"the {self._sizes(family, k)} heads of {family!r}", rows, gains,
            n_random=self.n_random, n_users=len({*self.user_ids}), level=level,
        )  # fmt: skip


def _sum(tensors: Mapping[str, Tensor], weights: Mapping[str, float], part: Share) -> Tensor:
    return torch.stack([weight * _part(tensors[name], part) for name, weight in weights.items()]).sum(0)


def _part(values: Float64[Tensor, "*rest 2"], part: Share) -> Float64[Tensor, "*rest"]:
    if part == "rest":
        return values[..., 0] - values[..., 1]
    if part not in ("all", "copied"):
        raise ScoreError(f"to_frame: part {part!r} is unknown; use 'all', 'copied' or 'rest'")
    return values[..., 0 if part == "all" else 1]
