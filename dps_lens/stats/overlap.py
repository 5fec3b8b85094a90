"""How far sets of heads agree, beside what chance gives and what one user's own data give."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float64
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import rankdata
from torch import Tensor

from dps_lens.errors import HeadError, ScoreError
from dps_lens.found import FoundHeads
from dps_lens.heads import HeadSet
from dps_lens.result import Result
from dps_lens.scores import HeadScores
from dps_lens.stats.intervals import interval
from dps_lens.stats.null import MEASURES, ceiling_of, compare_sets

if TYPE_CHECKING:
    import pandas

MIN_USERS = 3


@dataclass(frozen=True, eq=False, repr=False)
class Overlap(Result):
    """Jaccard overlap of every pair of head sets; read it only beside its null and its ceiling.

    An overlap inside the null interval is what sets with the same number of heads in each layer share by chance.
    A low overlap between two users shows different heads only where one user's own halves overlap more
    (`user_specific`): small samples alone lower it. The ceiling comes from halves, so compare `within` with
    `between`, not with `jaccard`, which uses all examples.

    Attributes:
        names: of the sets; rows and columns of every matrix.
        sets: by name; with `exclude`, before heads were dropped.
        jaccard: 1 on the diagonal. With `exclude`, row A column B: A without B's top share, against B.
        null_mean: mean overlap of random sets; NaN on the diagonal, as in `null_low`, `null_high`, `p`, `mid_p`.
        null_low: 2.5% quantile of the same.
        null_high: 97.5% quantile.
        p: one-sided add-one p-values of an overlap at least as large; one pair at a time, not corrected for many.
        mid_p: the same with ties broken at random: uniform under the null, where `p` is too large.
        spearman: rank correlation of the mean maps over all heads; NaN for sets without scores.
        order: indices of `names` with similar sets side by side.
        linkage: average linkage on 1 − Jaccard, as of scipy; averaged over both directions with `exclude`.
        ceiling: one row a user: `user`, `within` (overlap of the user's own halves), `between` (with other users'
            halves) and `difference`, means over random splits at one example count; None without such users.
        manifest: `k`, `n_null`, `n_splits`, `seed`, `exclude`, `shape`, `unit` (`"users"` or `"sets"`) and
            `half`, the examples in each half.
    """

    stem: ClassVar[str] = "overlap"
    figure: ClassVar[str] = "overlap"

    names: tuple[str, ...]
    sets: dict[str, HeadSet]
    jaccard: Float64[Tensor, "set set"]
    null_mean: Float64[Tensor, "set set"]
    null_low: Float64[Tensor, "set set"]
    null_high: Float64[Tensor, "set set"]
    p: Float64[Tensor, "set set"]
    mid_p: Float64[Tensor, "set set"]
    spearman: Float64[Tensor, "set set"]
    order: tuple[int, ...]
    linkage: Float64[np.ndarray, "merge 4"]
    ceiling: "pandas.DataFrame | None" = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        return f"{len(self.names)} {self.manifest.get('unit', 'sets')}, top {self.manifest.get('k')}"

    @property
    def specificity(self) -> "pandas.DataFrame | None":
        """Mean over users and 95% Student's t interval of the columns of `ceiling`, one row a column."""
        import pandas as pd

        if self.ceiling is None:
            return None
        measures = ("within", "between", "difference")
        return pd.DataFrame([{"measure": name, **interval(self.ceiling[name].to_numpy(), 0.95)} for name in measures])

    @property
    def user_specific(self) -> bool | None:
        """Whether the interval of `difference` lies above 0; None for fewer than 3 users or without ceiling."""
        specificity = self.specificity
        if specificity is None or self.ceiling is None or len(self.ceiling) < MIN_USERS:
            return None
        return bool(specificity.set_index("measure")["low"]["difference"] > 0)

    def to_frame(self) -> "pandas.DataFrame":
        """One row a pair: `a`, `b` and every measure; each ordered pair where `exclude` was given."""
        import pandas as pd

        directed = self.manifest.get("exclude") is not None
        n = len(self.names)
        pairs = [(a, b) for a in range(n) for b in range(n) if a < b or (directed and a != b)]
        measures = (*MEASURES, "spearman")
        return pd.DataFrame(
            [
                {
                    "a": self.names[a],
                    "b": self.names[b],
                    **{name: float(getattr(self, name)[a, b]) for name in measures},
                }
                for a, b in pairs
            ]
        )


def overlap(
    sets: Mapping[str, HeadSet | HeadScores | FoundHeads] | HeadScores,
    *,
    k: int = 10,
    n_null: int = 1000,
    exclude: float | None = None,
    shape: tuple[int, int] | None = None,
    n_splits: int = 100,
    seed: int = 0,
) -> Overlap:
    """Compare head sets of users or families, beside layer-matched random sets.

    Args:
        sets: by name; scores stand for their top `k`, head sets and found ones for themselves. Scores alone stand for
            their users, one set a user, and give the ceiling.
        k: heads to take from scores.
        n_null: random pairs of sets for each pair, with as many heads in each layer as the pair.
        exclude: before A is compared with B, drop the best share of B's heads (such as 0.02) from A and then take
            A's top `k` (Yin & Steinhardt 2025, arXiv 2502.14010); the random sets avoid those heads too.
        shape: `(n_layers, n_heads)` of the model, where no set knows it.
        n_splits: random splits of the users' examples for the ceiling.
        seed: of the random sets, the ties and the splits.

    Raises:
        HeadError: the model's size is unknown or contradictory, a head lies outside it, or there are fewer than
            `k` heads.
        ScoreError: fewer than two sets, undefined scores, or `exclude` for sets without scores or for a share
            that holds the whole top `k`.
    """
    given = _by_user(sets) if isinstance(sets, HeadScores) else sets
    entries = {name: one.heads if isinstance(one, FoundHeads) else one for name, one in given.items()}
    if len(entries) < 2:
        raise ScoreError(f"overlap: {len(entries)} set; give at least two sets, or scores of at least two users")
    if min(k, n_null, n_splits) < 1:
        raise ScoreError(f"overlap: k, n_null and n_splits start at 1, found {k}, {n_null} and {n_splits}")
    shape = _shape(entries, shape)
    names = tuple(entries)
    scored = {name: entry for name, entry in entries.items() if isinstance(entry, HeadScores)}
    tops = {n: entry.top(k, label=n) if isinstance(entry, HeadScores) else entry for n, entry in entries.items()}
    dropped = _dropped(entries, scored, k, exclude)
    masks = {name: _mask(name, heads, shape) for name, heads in tops.items()}
    nothing = torch.zeros(shape, dtype=torch.bool)
    pairs = np.full((len(MEASURES), len(names), len(names)), np.nan)
    pairs[0][np.diag_indices(len(names))] = 1.0
    for row, a in enumerate(names):
        for column, b in enumerate(names):
            rng = np.random.default_rng([seed, row, column])
            if exclude is not None and row != column:
                chosen = _mask(a, scored[a].top(k, exclude=dropped[b]), shape)
                pairs[:, row, column] = compare_sets(chosen, masks[b], _mask(b, dropped[b], shape), n_null, rng)
            elif row < column:
                pairs[:, row, column] = pairs[:, column, row] = compare_sets(masks[a], masks[b], nothing, n_null, rng)
    tree = linkage(squareform(1 - (pairs[0] + pairs[0].T) / 2, checks=False), method="average", optimal_ordering=True)
    jaccard, null_mean, null_low, null_high, p, mid_p = torch.from_numpy(pairs)
    n_dropped = max((len(heads) for heads in dropped.values()), default=0)
    ceiling, half = ceiling_of(sets, k, n_dropped, n_splits, seed) if isinstance(sets, HeadScores) else (None, None)
    return Overlap(
        names,
        tops,
        jaccard,
        null_mean,
        null_low,
        null_high,
        p,
        mid_p,
        spearman=_spearman(names, scored),
        order=tuple(leaves_list(tree).tolist()),
        linkage=tree,
        ceiling=ceiling,
        manifest={
            "k": k,
            "n_null": n_null,
            "n_splits": n_splits,
            "seed": seed,
            "exclude": exclude,
            "shape": shape,
            "unit": "users" if isinstance(sets, HeadScores) else "sets",
            "half": half,
        },
    )


def _by_user(scores: HeadScores) -> dict[str, HeadSet | HeadScores]:
    return {
        user: HeadScores(
            scores.values[scores.rows(user)],
            example_ids=[scores.example_ids[row] for row in scores.rows(user)],
            user_ids=[user] * len(scores.rows(user)),
            manifest=scores.manifest,
        )
        for user in scores.users
    }


def _shape(entries: Mapping[str, HeadSet | HeadScores], given: tuple[int, int] | None) -> tuple[int, int]:
    known = {name: tuple(e.values.shape[1:]) if isinstance(e, HeadScores) else e.shape for name, e in entries.items()}
    shapes = {shape for shape in (given, *known.values()) if shape is not None}
    if not shapes:
        raise HeadError("overlap: no set knows the model's size; give shape=(n_layers, n_heads)")
    if len(shapes) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in {"shape=": given, **known}.items() if shape)
        raise HeadError(f"overlap: the sets are of models of different sizes ({listed}); compare within one model")
    layers, heads = shapes.pop()
    return layers, heads


def _mask(name: str, heads: HeadSet, shape: tuple[int, int]) -> Bool[Tensor, "layer head"]:
    try:
        return heads.mask(SimpleNamespace(n_layers=shape[0], n_heads=shape[1]))
    except HeadError as error:
        raise HeadError(f"overlap: {name}: {error}; check shape= against the model") from error


def _dropped(
    entries: Mapping[str, HeadSet | HeadScores], scored: Mapping[str, HeadScores], k: int, exclude: float | None
) -> dict[str, HeadSet]:
    """What each entry takes away from the others."""
    if exclude is None:
        return {}
    if not 0 < exclude < 1:
        raise ScoreError(f"overlap: exclude is a share between 0 and 1, such as 0.02, found {exclude}")
    if bare := [name for name in entries if name not in scored]:
        raise ScoreError(f"overlap: exclude needs scores for every entry, {bare[0]!r} is a HeadSet; give its scores")
    dropped = {name: scores.top_share(exclude) for name, scores in scored.items()}
    if (n := len(next(iter(dropped.values())))) >= k:
        raise ScoreError(f"overlap: exclude={exclude} drops {n} heads, all of the top {k}; use a larger k")
    return dropped


def _spearman(names: tuple[str, ...], scored: Mapping[str, HeadScores]) -> Float64[Tensor, "set set"]:
    correlations = np.full((len(names), len(names)), np.nan)
    if scored:
        where = [names.index(name) for name in scored]
        ranks = np.stack([rankdata(scores.mean().flatten().numpy()) for scores in scored.values()])
        with np.errstate(divide="ignore", invalid="ignore"):  # a constant map correlates with nothing: NaN
            correlations[np.ix_(where, where)] = np.corrcoef(ranks)
    return torch.from_numpy(correlations)
