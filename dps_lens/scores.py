"""HeadScores: a value per example, layer and head, with what it was measured on."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dps_lens.errors import HeadError, ScoreError
from dps_lens.files import read_tensors, write_json, write_tensors
from dps_lens.heads import Head, HeadSet

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

_TENSORS = "scores.safetensors"
_MANIFEST = "scores.json"
_FORMAT = 1


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


class HeadScores:
    """Scores of every head on every example; positive means the head helps.

    Attributes:
        values: `Float[Tensor, "example layer head"]`, nats per token for PCS.
        components: what `values` was made of, same shape: for a profile-specific PCS `"own"` and
            `"no_profile"` or `"other_user"`.
        nll: mean NLL of the unablated model per example, nats per token, by condition.
        exact: `Bool[Tensor, "example layer head"]`, False where a value is a first-order estimate.
        example_ids: one a row.
        user_ids: one a row.
        manifest: model, data, settings, seed and sign convention.
    """

    def __init__(
        self,
        values: Float[Tensor, "example layer head"],
        *,
        example_ids: Sequence[str],
        user_ids: Sequence[str],
        components: Mapping[str, Tensor] | None = None,
        nll: Mapping[str, Tensor] | None = None,
        exact: Bool[Tensor, "example layer head"] | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        if not len(values) == len(example_ids) == len(user_ids):
            raise ScoreError(
                f"HeadScores: {len(values)} rows of values, {len(example_ids)} examples, {len(user_ids)} users"
            )
        self.values = values
        self.components = dict(components or {})
        self.nll = dict(nll or {})
        self.exact = torch.ones(values.shape, dtype=torch.bool) if exact is None else exact
        self.example_ids = tuple(example_ids)
        self.user_ids = tuple(user_ids)
        self.manifest = dict(manifest or {})

    def __repr__(self) -> str:
        examples, layers, heads = self.values.shape
        return f"HeadScores({examples} examples of {len(self.users)} users, {layers} layers × {heads} heads)"

    @property
    def users(self) -> tuple[str, ...]:
        """The users, in order of appearance."""
        return tuple(dict.fromkeys(self.user_ids))

    @property
    def noise_floor(self) -> NoiseFloor | None:
        """Noise of the model's number format, once `measure_noise` has measured it."""
        found = self.manifest.get("noise_floor")
        return NoiseFloor(**found) if found else None

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
        """The examples of all parts, with the manifest of the first."""
        first = parts[0]
        return cls(
            torch.cat([part.values for part in parts]),
            example_ids=[one for part in parts for one in part.example_ids],
            user_ids=[one for part in parts for one in part.user_ids],
            components={name: torch.cat([part.components[name] for part in parts]) for name in first.components},
            nll={name: torch.cat([part.nll[name] for part in parts]) for name in first.nll},
            exact=torch.cat([part.exact for part in parts]),
            manifest=first.manifest,
        )

    def take(self, rows: Sequence[int]) -> "HeadScores":
        """These examples, in this order."""
        return HeadScores(
            self.values[rows],
            example_ids=[self.example_ids[row] for row in rows],
            user_ids=[self.user_ids[row] for row in rows],
            components={name: component[rows] for name, component in self.components.items()},
            nll={name: values[rows] for name, values in self.nll.items()},
            exact=self.exact[rows],
            manifest=self.manifest,
        )

    def clusters(self, user: str | None = None, *, of: str | None = None) -> Float[Tensor, "cluster layer head"]:
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
        return self.clusters(user, of=of).mean(0)

    def ci(
        self, level: float = 0.95, user: str | None = None, *, of: str | None = None
    ) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """Interval of the mean: Student's t over user means, or over one user's examples.

        One head at a time, without correction for looking at many. NaN where there is a single unit.
        """
        from scipy.stats import t

        clusters = self.clusters(user, of=of)
        n = len(clusters)
        half = torch.full_like(clusters[0], float("nan"))
        if n > 1:
            half = clusters.std(0) / n**0.5 * float(t.ppf(0.5 + level / 2, n - 1))
        return clusters.mean(0) - half, clusters.mean(0) + half

    def top(
        self,
        k: int,
        user: str | None = None,
        *,
        max_cost: float | None = None,
        exclude: HeadSet | None = None,
        label: str | None = None,
    ) -> HeadSet:
        """The `k` heads of largest mean, best first; ties by layer, then head.

        Args:
            k: how many.
            user: rank by this user's examples alone.
            max_cost: leave out heads whose ablation costs more than this without the user's profile
                (nats per token); needs a contrast.
            exclude: leave out these heads, such as another family's `top_share(0.02)`.
            label: of the set; by default the user, or the family.

        Raises:
            HeadError: there are fewer than `k` heads to choose from.
            ScoreError: the scores are not defined (NaN); says why.
        """
        self.check_defined("top")
        mean = self.mean(user)
        allowed = torch.ones_like(mean, dtype=torch.bool)
        if max_cost is not None:
            baseline = next((name for name in ("no_profile", "other_user") if name in self.components), None)
            if baseline is None:
                raise ScoreError("top: max_cost needs scores with a contrast")
            allowed = self.mean(user, of=baseline) <= max_cost
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

    def save(self, folder: str | Path) -> None:
        """Write `scores.safetensors` and `scores.json`; a failed write leaves nothing that loads."""
        tensors = {"values": self.values}
        tensors |= {f"component.{name}": tensor for name, tensor in self.components.items()}
        tensors |= {f"nll.{name}": tensor for name, tensor in self.nll.items()}
        if not bool(self.exact.all()):
            tensors["exact"] = self.exact
        folder = Path(folder)
        (folder / _MANIFEST).unlink(missing_ok=True)  # never new values under an old manifest
        write_tensors(folder / _TENSORS, tensors)
        write_json(
            folder / _MANIFEST,
            {
                "format": _FORMAT,
                "example_ids": self.example_ids,
                "user_ids": self.user_ids,
                "manifest": self.manifest,
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "HeadScores":
        """Read what `save` wrote.

        Raises:
            ScoreError: the folder holds no whole scores.
        """
        folder = Path(folder)
        if not (folder / _MANIFEST).is_file():
            raise ScoreError(f"{folder} holds no scores (no {_MANIFEST}); is the run finished?")
        try:
            meta = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            example_ids, user_ids, manifest = meta["example_ids"], meta["user_ids"], meta["manifest"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ScoreError(f"{folder / _MANIFEST} is not a scores manifest ({error})") from error
        tensors = read_tensors(folder / _TENSORS)

        def group(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        return cls(
            tensors["values"],
            example_ids=example_ids,
            user_ids=user_ids,
            components=group("component."),
            nll=group("nll."),
            exact=tensors.get("exact"),
            manifest=manifest,
        )

    def plot(self, user: str | None = None) -> "plotly.graph_objects.Figure":
        """`dps_lens.plots.heatmap` of these scores."""
        from dps_lens.plots import heatmap

        return heatmap(self, user=user)
