"""What steering does to the users' own texts at every strength, at equal KL, and which strength to take."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from dps_lens.checks import check_number
from dps_lens.errors import SteeringError
from dps_lens.result import Result
from dps_lens.scoring.objectives import measured_name
from dps_lens.stats.intervals import columns, interval, user_means

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class SteeringSweep(Result):
    """What steering does to the users' own text, at every strength.

    Attributes:
        strengths: γ, α, or the cap of an adaptive strength.
        user_ids: of each example.
        example_ids: the examples.
        nll: of the full model, nats per token; where answers are compared, the objective in place of the NLL.
        change: method → NLL under steering minus that of the full model; below 0 the text became likelier, of pairs the
            own text beside the rejected one. `"… (random)"` holds layer-matched random heads instead, the mean of an
            example's draws.
        kl: method → KL(steered ‖ full), nats per token, mean over the positions of the text, and over answers.
        manifest: settings.
    """

    stem: ClassVar[str] = "steering"
    figure: ClassVar[str] = "steering"

    strengths: tuple[float, ...]
    user_ids: tuple[str, ...]
    example_ids: tuple[str, ...]
    nll: Float64[Tensor, " example"]
    change: Mapping[str, Float64[Tensor, "strength example"]]
    kl: Mapping[str, Float64[Tensor, "strength example"]]
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        return f"{', '.join(self.methods)} at {len(self.strengths)} strengths on {len(self.example_ids)} examples"

    @property
    def loss(self) -> str:
        """What changes: the NLL, or the objective by its name."""
        return measured_name(self.manifest)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names, random controls included."""
        return tuple(self.change)

    def to_frame(self, level: float = 0.95) -> "pandas.DataFrame":
        """One row a method and strength: `mean` change of the NLL with its interval over users, `kl`, and the
        `difference` to random heads at the same strength, paired by user. Intervals are over users, given the random
        sets that were drawn."""
        import pandas as pd

        rows = []
        for name in self.methods:
            for index, strength in enumerate(self.strengths):
                change = self._users(self.change[name][index])
                row = {"method": name, "strength": strength, **interval(change, level)}
                row["kl"] = float(self._users(self.kl[name][index]).mean())
                if (control := random_of(name)) in self.change:
                    row |= columns("difference", interval(change - self._users(self.change[control][index]), level))
                rows.append(row)
        return pd.DataFrame(rows)

    def at_kl(self, kl: float, level: float = 0.95) -> "pandas.DataFrame":
        """Every method at the strength where its mean KL over users is `kl` nats per token.

        Between two strengths of the grid every user's change is interpolated linearly in the root of the mean KL:
        for weak steering the change grows with the strength, the KL with its square. Methods that do not reach `kl`
        have NaN.

        Returns:
            one row a method: `strength`, `mean` change with interval, and `difference` to random heads at the same KL.

        Raises:
            SteeringError: `kl` is not positive.
        """
        import pandas as pd

        if not kl > 0:
            raise SteeringError(f"at_kl: {kl} is no KL to steer to; give nats per token above 0")
        at = {name: self._at_kl(name, kl) for name in self.methods}
        rows = []
        for name, (strength, change) in at.items():
            row = {"method": name, "kl": kl, "strength": strength, **interval(change, level)}
            if (control := random_of(name)) in at:
                row |= columns("difference", interval(change - at[control][1], level))
            rows.append(row)
        return pd.DataFrame(rows)

    def by_user(self, kl: float) -> "pandas.DataFrame":
        """One row a user, for statistics of your own: the change of the NLL of every method at the strength of `at_kl`.

        Columns: `user`, and the methods; NaN where a method does not reach `kl`.

        Raises:
            SteeringError: `kl` is not positive.
        """
        import pandas as pd

        check_number(SteeringError, "by_user: kl", kl, above=0, why="nats per token")
        changes = {name: self._at_kl(name, kl)[1] for name in self.methods}
        return pd.DataFrame({"user": list(dict.fromkeys(self.user_ids)), **changes})

    def _at_kl(self, name: str, kl: float) -> tuple[float, np.ndarray]:
        changes = np.stack([self._users(row) for row in self.change[name]])
        roots = np.array([max(self._users(row).mean(), 0.0) for row in self.kl[name]]) ** 0.5
        # No steering is the first point of every curve.
        changes, roots = np.vstack([np.zeros(changes.shape[1]), changes]), np.append(0.0, roots)
        strengths = np.append(0.0, self.strengths)
        above = np.flatnonzero(roots >= kl**0.5)
        if not len(above):
            return float("nan"), np.full(changes.shape[1], np.nan)
        right = int(above[0])
        share = (kl**0.5 - roots[right - 1]) / (roots[right] - roots[right - 1])
        mixed = [(1 - share) * values[right - 1] + share * values[right] for values in (strengths, changes)]
        return float(mixed[0]), mixed[1]

    def choose(self, method: str, *, level: float = 0.95) -> "pandas.DataFrame":
        """The strength for every user, of a sweep on discovery examples (`HeldOutConfig(on="discovery")`); often 0.

        A user is steered at the strength that makes the texts likeliest on average, if it is shown to help: if
        Student's t interval over the user's texts, its level corrected for the number of strengths, lies below 0.

        Returns:
            one row a user: `user`, `strength`, `best`, the strength of the lowest mean, its `mean` change of the NLL
            with `low` and `high`, `n` texts, and the `reason` in words.

        Raises:
            SteeringError: the sweep holds no such method, or was measured on held-out texts.
        """
        import pandas as pd

        if method not in self.change:
            raise SteeringError(f"choose: method {method!r} is not in this sweep; it has {', '.join(self.change)}")
        if self.manifest.get("on") != "discovery":
            raise SteeringError(
                "choose: this sweep was measured on held-out texts, which must not choose; sweep with "
                "held_out_config=HeldOutConfig(on='discovery')"
            )
        unit = self.manifest.get("unit", "nats per token")
        rows, owners, corrected = [], np.array(self.user_ids), 1 - (1 - level) / len(self.strengths)
        for user in dict.fromkeys(self.user_ids):
            changes = self.change[method][:, owners == user].numpy()
            best = int(changes.mean(1).argmin())
            found, n = interval(changes[best], corrected), changes.shape[1]
            helps, at = found["high"] < 0, self.strengths[best]
            spread = f"{found['low']:+.3f} to {found['high']:+.3f}, {n} texts" if n > 1 else "one text, no interval"
            about = f"the {self.loss} of the own texts changes by {found['mean']:+.3f} {unit} ({spread})"
            reason = f"at {at:g} {about}" if helps else f"no strength is shown to help; at {at:g}, the best, {about}"
            row = {"user": user, "strength": at if helps else 0.0, "best": at, **found, "n": n, "reason": reason}
            rows.append(row)
        return pd.DataFrame(rows)

    def _users(self, values: Float64[Tensor, " example"]) -> np.ndarray:
        return user_means(values, self.user_ids)


def random_of(name: str) -> str:
    """What a method's random heads are called."""
    return f"{name} (random)"
