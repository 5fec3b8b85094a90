"""Faithfulness: what is kept of a gain when only the top of a ranking is, for growing sizes, and the areas of that."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.result import Result
from dps_lens.stats.intervals import (
    add_one_p,
    columns,
    interval,
    range_of_next,
    ratio_interval,
    sets_for_p,
    sets_for_range,
)

if TYPE_CHECKING:
    import pandas

_PROFILES = {"other_user": "another user's profile", "no_profile": "no profile"}


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(Result):
    """NLL, or another objective, when all heads but the top of a ranking are patched, of `faithfulness`.

    Attributes:
        families: names.
        sizes: shares of all heads, in growing order.
        counts: the numbers of heads that they are.
        user_ids: owner of each example.
        example_ids: one a row.
        full: `Float64[Tensor, "example"]`, of the model as it is.
        empty: `Float64[Tensor, "example"]`, with every head patched.
        circuits: `Float64[Tensor, "example family size"]`, with all heads but a circuit patched; NaN where the
            ranking holds fewer heads.
        random: `Float64[Tensor, "example draw size"]`, the same for random rankings.
        manifest: settings and rankings.
    """

    stem: ClassVar[str] = "faithfulness"
    figure: ClassVar[str] = "faithfulness"

    families: tuple[str, ...]
    sizes: tuple[float, ...]
    counts: tuple[int, ...]
    user_ids: tuple[str, ...]
    example_ids: tuple[str, ...]
    full: Float64[Tensor, " example"]
    empty: Float64[Tensor, " example"]
    circuits: Float64[Tensor, "example family size"]
    random: Float64[Tensor, "example draw size"]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Of losses and gains."""
        return str(self.manifest.get("unit", "nats per token"))

    def to_frame(self, *, level: float = 0.95) -> "pandas.DataFrame":
        """One row a family and size.

        Columns: `size`, `n_heads`; `f` with `low` and `high`, the ratio of user means and Fieller's interval over
        users, all NaN where `undefined()` says why; `recovered`, its numerator in nats per token with Student's t over
        users; `control`, the mean f of the random rankings, with `control_low` and `control_high`, between which that
        of one more lies with probability `level`; `p`, the share of random rankings with as large an f, one-sided and
        counting the family's own. 95% needs 39 random rankings for the range and 19 for a p.

        Args:
            level: of the intervals.
        """
        import pandas as pd

        gain, f_random = self._gain(level), self._random(level)
        recovered = self._users(self.empty[:, None, None] - self.circuits)
        rows = []
        for index, family in enumerate(self.families):
            for place, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
                values = recovered[:, index, place]
                row = {"family": family, "size": size, "n_heads": count}
                found = ratio_interval(values, gain, level)
                row |= {"f": found["mean"], "low": found["low"], "high": found["high"]}
                row |= columns("recovered", interval(values, level))
                rows.append(row | _beside("control", "p", found["mean"], f_random[:, place], level))
        return pd.DataFrame(rows)

    def areas(self, *, level: float = 0.95) -> "pandas.DataFrame":
        """One row a family: CPR and CMD, areas over the share of heads by the trapezoid rule between the given sizes.

        CPR, the area under f, is largest for the ranking that needs fewest heads; where heads work against the user's
        text it can exceed 1. CMD, the area between f and 1, is 0 for a ranking that behaves as the model at every
        size (arXiv 2504.13151, after the code published with it). Sums over sizes are taken before the ratio of user
        means, so that both have Fieller's interval over users; for CMD the sides of 1 on which f lies are taken as
        found. NaN where `undefined()` says why, and for a ranking that does not reach every size.

        Columns: `CPR` and `CMD`, each with `_low` and `_high`; `_control`, their mean over random rankings, with
        `_control_low` and `_control_high`, between which one more lies with probability `level`; `_p`, the share of
        random rankings that do as well (as large a CPR, as small a CMD), one-sided and counting the family's own.

        Args:
            level: of the intervals.
        """
        import pandas as pd

        gain, weights, f_random = self._gain(level), trapezoid(self.sizes), self._random(level)
        random = {"CPR": f_random @ weights, "CMD": np.abs(1 - f_random) @ weights}
        rows = []
        for index, family in enumerate(self.families):
            recovered = self._users(self.empty[:, None] - self.circuits[:, index])
            sides = np.where(recovered.mean(0) > gain.mean(), -1.0, 1.0)
            distance = ratio_interval((sides * (gain[:, None] - recovered)) @ weights, gain, level)
            distance["low"] = float(np.maximum(distance["low"], 0))  # as the area itself
            row: dict[str, Any] = {"family": family}
            for name, found in (("CPR", ratio_interval(recovered @ weights, gain, level)), ("CMD", distance)):
                row |= columns(name, found)
                row |= _beside(f"{name}_control", f"{name}_p", found["mean"], random[name], level, less=name == "CMD")
            rows.append(row)
        return pd.DataFrame(rows)

    def gain(self, *, level: float = 0.95) -> dict[str, float]:
        """m(M) − m(∅), what there is to recover: `mean`, `low`, `high` in nats per token, Student's t over users."""
        return interval(self._users(self.empty - self.full), level)

    def undefined(self, *, level: float = 0.95) -> str:
        """Why there is no f; empty where the gain's interval over users lies above 0."""
        gain = self.gain(level=level)
        if len({*self.user_ids}) < 2:
            return "one user gives no interval over users, so no share of the gain is claimed"
        if gain["low"] > 0:
            return ""
        over = _PROFILES[self.manifest.get("against", "other_user")]
        return (
            f"the gain over {over} is not reliably above 0 ({gain['mean']:.3f} {self.unit}, interval "
            f"{gain['low']:.3f} to {gain['high']:.3f}), so there is no share of it"
        )

    @property
    def n_random(self) -> int:
        """Random rankings."""
        return self.random.shape[1]

    @property
    def no_range(self) -> str:
        """Why there is no range of random rankings at 95%; empty where there is one, or no random ranking."""
        needed = sets_for_range(0.95)
        return f"a 95% range of random rankings needs {needed}" if 0 < self.n_random < needed else ""

    def summary(self) -> str:
        sizes = f"{100 * self.sizes[0]:g} to {100 * self.sizes[-1]:g}% of heads"
        found = f"{len(self.user_ids)} examples of {len({*self.user_ids})} users; {sizes}"
        if undefined := self.undefined():
            areas = [*self.families, undefined]
        else:
            table = self.areas().to_dict("records")
            areas = [f"{row['family']}: CPR {row['CPR']:.2f}, CMD {row['CMD']:.2f}" for row in table]
        notes = [f"{self.n_random} random rankings", *([self.no_range] if self.no_range else [])]
        return "; ".join([found, *areas, *notes])

    def _gain(self, level: float) -> Float[np.ndarray, " user"]:
        """Of each user; NaN where shares are not defined."""
        gain = self._users(self.empty - self.full)
        return np.full_like(gain, float("nan")) if self.undefined(level=level) else gain

    def _random(self, level: float) -> Float[np.ndarray, "draw size"]:
        """f of the random rankings."""
        return self._users(self.empty[:, None, None] - self.random).mean(0) / self._gain(level).mean()

    def _users(self, values: Float64[Tensor, "example ..."]) -> Float[np.ndarray, "user ..."]:
        owners = np.array(self.user_ids)
        return np.stack([values.numpy()[owners == user].mean(0) for user in dict.fromkeys(self.user_ids)])


def trapezoid(sizes: tuple[float, ...]) -> Float[np.ndarray, " size"]:
    """The weight of each value in the trapezoid rule.

    >>> trapezoid((0.0, 0.5, 1.0)).tolist()
    [0.25, 0.5, 0.25]
    """
    gaps = np.diff(sizes)
    return (np.append(gaps, 0.0) + np.append(0.0, gaps)) / 2


def _beside(
    control: str, p: str, found: float, random: Float[np.ndarray, " draw"], level: float, *, less: bool = False
) -> dict[str, float]:
    """A value beside those of random rankings, as columns; nothing where there are none."""
    if not len(random):
        return {}
    row = {control: float(random.mean())}
    row |= dict(zip((f"{control}_low", f"{control}_high"), range_of_next(random, level), strict=True))
    known = np.isfinite(found) and len(random) >= sets_for_p(level)
    sign = -1 if less else 1
    return row | {p: add_one_p(sign * found, sign * random) if known else float("nan")}
