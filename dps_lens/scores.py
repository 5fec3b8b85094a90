"""HeadScores: a value per example, layer and head, with what it was measured on."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.atlas import Atlas, atlas_of, published
from dps_lens.errors import HeadError, ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.result import Result

if TYPE_CHECKING:
    import pandas


def t_quantile(freedom: int | float, level: float) -> float:
    """How many standard errors a Student's t interval reaches to either side.

    Raises:
        ScoreError: the level is no share between 0 and 1.
    """
    from scipy.stats import t

    if not 0 < level < 1:
        raise ScoreError(f"an interval's level is a share between 0 and 1, such as 0.95; found {level}")
    return float(t.ppf(0.5 + level / 2, freedom))


PROFILES = {
    "own": "own profile",
    "no_profile": "no profile",
    "other_user": "other users' profiles",
    "both": "no profile and other users'",
    "other_user-no_profile": "other users' profiles beyond none",
    "no_profile-other_user": "no profile beyond other users'",
}
"""What a prompt shows, and what profiles are compared with, in words."""


class NoiseFloor(NamedTuple):
    """Scores in a low-precision format minus the same in float32, nats per token.

    Attributes:
        sd: standard deviation over examples and heads.
        bias: mean.
        n_examples: size of the sample.
    """

    sd: float
    bias: float
    n_examples: int

    def of_mean(self, n: int) -> float:
        """What the format can add to a mean of `n` examples: the bias and two standard errors."""
        return abs(self.bias) + 2 * self.sd / n**0.5


@dataclass(eq=False, repr=False)
class HeadScores(Result):
    """Scores of every head on every example; positive means the head helps.

    Attributes:
        values: `Float[Tensor, "example layer head"]`, nats per token for PCS.
        example_ids: one a row.
        user_ids: one a row.
        components: what `values` was made of, same shape: for patches `"patch.other_user"` and `"patch.no_profile"`,
            for ablations `"own"` and what it was compared with, `"no_profile"` or `"other_user"`.
        nll: mean NLL of the unablated model per example, nats per token, by condition.
        exact: `Bool[Tensor, "example layer head"]`, False where a value is a first-order estimate; all True by default.
        gap: `Float64[Tensor, "example"]`, of integrated scores: their sum over all heads, minus what patching all heads
            at once changes; 0 where the path was followed finely enough (completeness). Empty for other scores.
        tensors: what else was found, such as `"mean.own"`, the mean z that heads were replaced by.
        manifest: model, data, settings, seed and sign convention.
    """

    stem: ClassVar[str] = "scores"
    figure: ClassVar[str] = "heatmap"

    values: Float[Tensor, "example layer head"]
    example_ids: Sequence[str] = field(kw_only=True)
    user_ids: Sequence[str] = field(kw_only=True)
    components: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    nll: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    exact: Tensor = field(default_factory=lambda: torch.empty(0), kw_only=True)
    gap: Tensor = field(default_factory=lambda: torch.empty(0), kw_only=True)
    tensors: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)
    manifest: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if not len(self.values) == len(self.example_ids) == len(self.user_ids):
            raise ScoreError(
                f"HeadScores: {len(self.values)} rows of values, {len(self.example_ids)} examples, "
                f"{len(self.user_ids)} users"
            )
        shapes = {f"component {name}": part.shape for name, part in self.components.items()}
        shapes |= {"exact": self.exact.shape} if self.exact.numel() else {}
        for name, shape in shapes.items():
            if shape != self.values.shape:
                raise ScoreError(f"HeadScores: {name} is {tuple(shape)}, the values are {tuple(self.values.shape)}")
        if wrong := [name for name, each in self.nll.items() if each.shape != self.values.shape[:1]]:
            raise ScoreError(f"HeadScores: nll {wrong[0]!r} has not one value for each of {len(self.values)} examples")
        if self.gap.numel() and self.gap.shape != self.values.shape[:1]:
            raise ScoreError(f"HeadScores: gap has not one value for each of {len(self.values)} examples")
        if not self.exact.numel():
            self.exact = torch.ones(self.values.shape, dtype=torch.bool)
        self.example_ids, self.user_ids = tuple(self.example_ids), tuple(self.user_ids)

    def summary(self) -> str:
        examples, layers, heads = self.values.shape
        return f"{examples} examples of {len(self.users)} users, {layers} layers × {heads} heads"

    @property
    def name(self) -> str:
        """What the scores are, in a few words, for titles."""
        about = self.manifest
        if "family" in about:
            return str(about["family"]).replace("_", " ")
        against, method = PROFILES.get(str(about.get("against"))), about.get("method", "exact")
        ablation, objective = about.get("ablation", "zero"), about.get("objective", "nll")
        of = objective["name"] if isinstance(objective, dict) else objective
        measured = "" if of == "nll" else f", {of}"
        if ablation == "patch":
            back = "denoising" if about.get("direction") == "denoising" else "patch"
            return f"{method} {back} → {against}{measured}"
        name = f"PCS, own profile − {against}" if against else "PCS"
        how = [str(one) for one in (ablation, method) if one not in ("zero", "exact")]
        return (f"{name} ({', '.join(how)})" if how else name) + measured

    def name_of(self, component: str) -> str:
        """What a component is, in a few words."""
        patched = component.removeprefix("patch.")
        words = PROFILES.get(patched, patched)
        return f"patch → {words}" if patched != component else f"PCS, {words}"

    @property
    def users(self) -> tuple[str, ...]:
        """The users, in order of appearance."""
        return tuple(dict.fromkeys(self.user_ids))

    @property
    def noise_floor(self) -> NoiseFloor | None:
        """Noise of the model's number format, once `measure_noise` has measured it."""
        floor = self.manifest.get("noise_floor")
        return NoiseFloor(**floor) if floor else None

    def rows(self, user: str) -> list[int]:
        """Rows of one user.

        Raises:
            ScoreError: the user is not in these scores.
        """
        rows = [index for index, owner in enumerate(self.user_ids) if owner == user]
        if not rows:
            raise ScoreError(f"user {user!r} is not in these scores; users are {', '.join(self.users[:8])}…")
        return rows

    def without(self, users: Collection[str]) -> "HeadScores":
        """The scores of everybody else.

        Raises:
            ScoreError: nobody is left.
        """
        rows = [index for index, owner in enumerate(self.user_ids) if owner not in users]
        if not rows:
            raise ScoreError(f"without: all of the {len(self.users)} users are left out")
        return self.take(rows)

    def newest(self, n: int) -> "HeadScores":
        """The last `n` examples of each user."""
        return self.take([row for user in self.users for row in self.rows(user)[-n:]])

    @classmethod
    def join(cls, parts: Sequence["HeadScores"]) -> "HeadScores":
        """The examples of all parts, with the manifest of the first.

        Raises:
            ScoreError: they are of other models, or made of other components.
        """
        first = parts[0]
        made_of = [(p.values.shape[1:], {*p.components}, {*p.nll}, p.gap.numel() > 0) for p in parts]
        if wrong := [number for number, of in enumerate(made_of, start=1) if of != made_of[0]]:
            raise ScoreError(f"HeadScores.join: part {wrong[0]} is of another model, or made of other components")
        return replace(
            first,
            values=torch.cat([part.values for part in parts]),
            example_ids=[one for part in parts for one in part.example_ids],
            user_ids=[one for part in parts for one in part.user_ids],
            components={name: torch.cat([part.components[name] for part in parts]) for name in first.components},
            nll={name: torch.cat([part.nll[name] for part in parts]) for name in first.nll},
            exact=torch.cat([part.exact for part in parts]),
            gap=torch.cat([part.gap for part in parts]),
        )

    def take(self, rows: Sequence[int]) -> "HeadScores":
        """These examples, in this order."""
        return replace(
            self,
            values=self.values[rows],
            example_ids=[self.example_ids[row] for row in rows],
            user_ids=[self.user_ids[row] for row in rows],
            components={name: component[rows] for name, component in self.components.items()},
            nll={name: values[rows] for name, values in self.nll.items()},
            exact=self.exact[rows],
            gap=self.gap[rows] if self.gap.numel() else self.gap,
        )

    def samples(self, user: str | None = None, *, of: str | None = None) -> Float[Tensor, "sample layer head"]:
        """The independent units that an interval resamples: user means, or one user's examples.

        Args:
            user: one user instead of all.
            of: a component instead of `values`.
        """
        values = (self.components[of] if of else self.values).double()
        if user is not None:
            return values[self.rows(user)]
        return torch.stack([values[self.rows(name)].mean(0) for name in self.users])

    def mean(self, user: str | None = None, *, of: str | None = None) -> Float[Tensor, "layer head"]:
        """Mean over users of the user means, or the mean over one user's examples."""
        return self.samples(user, of=of).mean(0)

    def ci(
        self, level: float = 0.95, user: str | None = None, *, of: str | None = None
    ) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """Interval of the mean: Student's t over user means, or over one user's examples.

        One head at a time, without correction for looking at many. NaN where there is a single unit. It holds its level
        where units scatter symmetrically; see `skewness`.

        Raises:
            ScoreError: the level is no share between 0 and 1.
        """
        samples = self.samples(user, of=of)
        n, quantile = len(samples), t_quantile(max(len(samples) - 1, 1), level)
        half = samples.std(0) / n**0.5 * quantile if n > 1 else torch.full_like(samples[0], float("nan"))
        return samples.mean(0) - half, samples.mean(0) + half

    def skewness(self, user: str | None = None, *, of: str | None = None) -> Float[Tensor, "layer head"]:
        """Bias-adjusted skewness of every head over the users, or over one user's examples.

        Positive where a few units lie far above the rest. NaN for fewer than three units, or where none differ.
        """
        from scipy.stats import skew

        samples = self.samples(user, of=of).numpy()
        varies = (np.ptp(samples, axis=0) > 0) & (len(samples) > 2)
        found = np.full(varies.shape, np.nan)
        found[varies] = skew(samples[:, varies], axis=0, bias=False)
        return torch.from_numpy(found)

    def top(
        self,
        k: int,
        user: str | None = None,
        *,
        max_task_cost: float | None = None,
        exclude: HeadSet | None = None,
        label: str | None = None,
    ) -> HeadSet:
        """The `k` heads of largest mean, best first; ties by layer, then head.

        Args:
            k: how many.
            user: rank by this user's examples alone.
            max_task_cost: leave out heads whose ablation costs more than this without the user's profile
                (nats per token); needs against=.
            exclude: leave out these heads, such as another family's `top_share(0.02)`.
            label: of the set; by default the user, or the family.

        Raises:
            HeadError: there are fewer than `k` heads to choose from.
            ScoreError: the scores are not defined (NaN); says why.
        """
        self.check_defined("top")
        mean = self.mean(user)
        allowed = torch.ones_like(mean, dtype=torch.bool)
        if max_task_cost is not None:
            baseline = next((name for name in ("no_profile", "other_user") if name in self.components), None)
            if baseline is None:
                raise ScoreError(
                    "top: max_task_cost needs what ablating a head costs another prompt, which these scores do not "
                    "hold; use find_heads, which bounds the cost of the whole set"
                )
            allowed = self.mean(user, of=baseline) <= max_task_cost
        if exclude is not None:
            allowed &= ~exclude.mask(SimpleNamespace(n_layers=mean.shape[0], n_heads=mean.shape[1]))
        candidates = [Head(int(layer), int(head)) for layer, head in allowed.nonzero().tolist()]
        if k > len(candidates) or k < 0:
            raise HeadError(f"top: asked for {k} of {len(candidates)} heads")
        # Python's sort is stable, so equal values keep the order by layer and head.
        ranked = sorted(candidates, key=lambda head: -float(mean[head]))
        label = label if label is not None else user or str(self.manifest.get("family", "preference"))
        return HeadSet(ranked[:k], label, (mean.shape[0], mean.shape[1]))

    def top_share(self, share: float) -> HeadSet:
        """The best `share` of all heads, at least one."""
        return self.top(max(1, round(share * self.values[0].numel())))

    def publish(self, folder: str | Path, *, k: int = 10) -> Atlas:
        """Write a head atlas: the top k heads, all heads' means with their intervals over users, and the settings; no
        user's text or id. `load_atlas` reads it.

        Raises:
            ScoreError: the scores are not defined (NaN).
        """
        low, high = self.ci()
        return published(
            atlas_of(
                self.top(k),
                self.mean(),
                low=low,
                high=high,
                n_users=len(self.users),
                n_examples=len(self.values),
                manifest=self.manifest,
            ),
            folder,
        )

    @property
    def defined(self) -> bool:
        """False for a reference family that the model does not show; `manifest["reason"]` says why."""
        return not bool(self.values.isnan().any())

    def check_defined(self, call: str) -> None:
        """Raise `ScoreError` where the scores are NaN."""
        if not self.defined:
            family = self.manifest.get("family", "these scores")
            raise ScoreError(f"{call}: {family} are not defined: {self.manifest.get('reason', 'a value is NaN')}")

    def to_frame(self, user: str | None = None, level: float = 0.95) -> "pandas.DataFrame":
        """One row a head, best first: mean, interval, means of the components, share of exact values."""
        import pandas as pd

        mean = self.mean(user)
        low, high = self.ci(level, user)
        layers, heads = np.indices(mean.shape).reshape(2, -1)
        columns = {
            "name": [str(Head(int(layer), int(head))) for layer, head in zip(layers, heads, strict=True)],
            "layer": layers,
            "head": heads,
            "mean": mean.flatten(),
            "low": low.flatten(),
            "high": high.flatten(),
        }
        columns |= {name: self.mean(user, of=name).flatten() for name in self.components}
        rows = self.rows(user) if user else slice(None)
        columns["exact"] = self.exact[rows].float().mean(0).flatten()
        frame = pd.DataFrame(columns)
        return frame.sort_values(["mean", "layer", "head"], ascending=[False, True, True], ignore_index=True)
