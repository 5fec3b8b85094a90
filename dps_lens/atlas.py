"""Head atlases: which heads matter in a model, small enough to publish, with nothing of anybody's text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.errors import ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.result import Result
from dps_lens.version import __version__

if TYPE_CHECKING:
    import pandas

_TOLD = (
    "call", "family", "method", "ablation", "against", "direction", "objective", "positions", "discovery", "k",
    "max_task_cost", "max_neutral_cost", "n_bootstraps", "settings", "max_examples", "n_donors", "ig_steps", "seed",
    "prompt_config", "unit", "sign", "tokenizer", "data",
)  # fmt: skip
"""Of a manifest, what an atlas tells: settings and digests, no names of users, files or machines."""

_OF_MODEL = ("name", "n_layers", "n_heads", "dtype", "weights", "libraries")


@dataclass(frozen=True, eq=False, repr=False)
class Atlas(Result):
    """What `scores.publish` and `found.publish` write: heads, intervals and settings, and no user's text or id.

    Attributes:
        heads: best first.
        values: mean over users of what heads are ranked by.
        low: of the 95% interval over users; NaN where there is none.
        high: of the same.
        inclusion: share of resamples of users that chose a head; empty where nobody resampled.
        n_users: whose examples were read; of a reference family, prompts or groups of them.
        n_examples: so many.
        manifest: model, settings and digests.
    """

    stem: ClassVar[str] = "atlas"

    heads: HeadSet
    values: Float[Tensor, "layer head"]
    low: Float[Tensor, "layer head"]
    high: Float[Tensor, "layer head"]
    inclusion: Tensor
    n_users: int
    n_examples: int
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        return (
            f"{len(self.heads)} heads of {self.model}, {self.n_examples} examples of {self.n_users} users: {self.heads}"
        )

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.manifest.get("model", {}).get("name", "a model"))

    def to_frame(self) -> "pandas.DataFrame":
        """One row a head of the atlas: `place`, `name`, `value`, `low`, `high`, and `inclusion` where there is one."""
        import pandas as pd

        rows = []
        for place, head in enumerate(self.heads, start=1):
            row = {"place": place, "name": str(head), "value": float(self.values[head])}
            row |= {"low": float(self.low[head]), "high": float(self.high[head])}
            rows.append(row | ({"inclusion": float(self.inclusion[head])} if self.inclusion.numel() else {}))
        return pd.DataFrame(rows)

    def expected_jaccard(self) -> float:
        """The overlap that two sets of this size have whose heads are chosen independently at these frequencies; NaN
        without resamples. `Σ p² / (Σ p + Σ p − Σ p²)`, a ratio of means."""
        if not self.inclusion.numel():
            return float("nan")
        shared = float((self.inclusion**2).sum())
        return shared / (2 * float(self.inclusion.sum()) - shared)


def told(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What an atlas tells of a manifest."""
    about = {name: manifest[name] for name in _TOLD if name in manifest}
    model = manifest.get("model", {})
    # In the place of the command line, which names files.
    return about | {
        "model": {name: model[name] for name in _OF_MODEL if name in model},
        "made": {"dps_lens": __version__},
    }


def load_atlas(source: str | Path) -> Atlas:
    """Read an atlas from a folder, or one that comes with the package by its name.

    Raises:
        ScoreError: there is none; names those that come with the package.
    """
    shipped = files("dps_lens").joinpath("atlases")
    names = sorted(one.name for one in shipped.iterdir() if one.is_dir()) if shipped.is_dir() else []
    if str(source) in names and not Path(source).is_dir():
        return Atlas.load(Path(str(shipped)) / str(source))
    if not Path(source).is_dir():
        shipped_too = f"; with the package come {', '.join(names)}" if names else ""
        raise ScoreError(f"load_atlas: there is no folder {str(source)!r}{shipped_too}")
    return Atlas.load(source)


def compare_atlas(one: Atlas, other: Atlas, *, k: int | None = None) -> dict[str, Any]:
    """How far two atlases of one architecture agree, and in which settings they differ.

    Args:
        one: an atlas.
        other: with as many layers and heads.
        k: heads of each; by default as many as the shorter one lists.

    Returns:
        `k`; `jaccard` of the first k heads, and what it is by chance for sets of this size; `expected`, what the
        inclusion frequencies of `one` let two of its like have; `spearman`, the rank correlation of all heads' values;
        `differ`, setting → both values.

    Raises:
        ScoreError: they are of models of other sizes, or list fewer heads than k.
    """
    from scipy.stats import spearmanr

    if one.values.shape != other.values.shape:
        raise ScoreError(
            f"compare_atlas: {one.model} has {tuple(one.values.shape)} layers and heads, {other.model} "
            f"{tuple(other.values.shape)}; heads of models of other sizes do not correspond"
        )
    most = min(len(one.heads), len(other.heads))
    k = most if k is None else k
    if not 1 <= k <= most:
        raise ScoreError(f"compare_atlas: k is {k!r}; both list {most} heads")
    settings = [_flat(atlas.manifest) for atlas in (one, other)]
    names = [name for name in dict.fromkeys((*settings[0], *settings[1])) if not name.startswith("made")]
    return {
        "k": k,
        "jaccard": one.heads[:k].jaccard(other.heads[:k]),
        "chance": chance_jaccard(k, one.values.numel()),
        "expected": one.expected_jaccard() if k == len(one.heads) else float("nan"),
        "spearman": float(spearmanr(one.values.flatten(), other.values.flatten()).statistic),
        "differ": {
            name: (settings[0].get(name), settings[1].get(name))
            for name in names
            if settings[0].get(name) != settings[1].get(name)
        },
    }


def chance_jaccard(k: int, n: int) -> float:
    """Mean overlap of two random sets of k of n heads.

    >>> round(chance_jaccard(10, 270), 4)
    0.0192
    """
    from scipy.stats import hypergeom

    return float(sum(hypergeom(n, k, k).pmf(shared) * shared / (2 * k - shared) for shared in range(k + 1)))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def atlas_of(
    heads: HeadSet,
    values: Float[Tensor, "layer head"],
    *,
    low: Float[Tensor, "layer head"] | None = None,
    high: Float[Tensor, "layer head"] | None = None,
    inclusion: Mapping[Head, float] | None = None,
    n_users: int,
    n_examples: int,
    manifest: Mapping[str, Any],
) -> Atlas:
    """An atlas of anything that ranks heads."""
    nothing = torch.full_like(values.float(), float("nan"))
    chosen = torch.empty(0)
    if inclusion:
        chosen = torch.zeros_like(nothing)
        for head, share in inclusion.items():
            chosen[head] = share
    return Atlas(
        HeadSet(heads, heads.label, (values.shape[0], values.shape[1])),
        values.float(),
        nothing if low is None else low.float(),
        nothing if high is None else high.float(),
        chosen,
        n_users,
        n_examples,
        told(manifest),
    )


def published(atlas: Atlas, folder: str | Path) -> Atlas:
    """Write an atlas, with its heads as a table for those who have no dps_lens."""
    atlas.save(folder)
    atlas.to_frame().to_csv(Path(folder) / "heads.csv", index=False)
    return atlas
