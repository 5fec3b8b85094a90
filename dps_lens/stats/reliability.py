"""How far a ranking of heads repeats itself, and how many examples a stable top-K needs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from dps_lens.errors import ScoreError
from dps_lens.scores import HeadScores

if TYPE_CHECKING:
    import pandas

BAND = (0.025, 0.975)


def split_half(
    scores: HeadScores, *, k: int = 10, user: str | None = None, n_splits: int = 200, seed: int = 0
) -> "pandas.DataFrame":
    """Agreement of two disjoint halves of the users, or of one user's examples.

    Returns:
        rows `spearman` (over all heads), `spearman_brown` (stepped up to the full number of units) and
        `jaccard` (of the two top-K), with mean and the 2.5% and 97.5% quantiles over random splits of these units.
        Those say how much the split matters; they are no interval for other users.

    Raises:
        ScoreError: fewer than two units, or fewer than `k` heads.
    """
    import pandas as pd

    units = _units(scores, user, k)
    n = len(units) // 2
    found = np.array([_agreement(units, n, k, rng) for rng in _generators(seed, n_splits)])
    correlation, jaccard = found.T
    columns = {"spearman": correlation, "spearman_brown": 2 * correlation / (1 + correlation), "jaccard": jaccard}
    return pd.DataFrame(
        [
            {
                "measure": name,
                "mean": values.mean(),
                "low": np.quantile(values, 0.025),
                "high": np.quantile(values, 0.975),
            }
            for name, values in columns.items()
        ]
    )


def stability(
    scores: HeadScores,
    *,
    k: int = 10,
    user: str | None = None,
    sizes: Sequence[int] | None = None,
    n_splits: int = 200,
    seed: int = 0,
) -> "pandas.DataFrame":
    """Agreement of the top-K of two disjoint sets of n units, for growing n.

    Args:
        scores: the units are users, or the examples of `user`.
        k: size of the top.
        user: one user instead of all.
        sizes: numbers of units; by default 1 to half of them.
        n_splits: random pairs of sets for each size.
        seed: of the pairs.

    Returns:
        one row a size: `units`, mean `jaccard` and `spearman`, and quantiles `low`, `high` of the Jaccard
        overlap over random pairs of sets, no interval for other users. `chance` is the expected overlap of two
        random sets of K heads.
    """
    import pandas as pd

    units = _units(scores, user, k)
    rows = []
    n_heads = units.shape[1]
    for size in sizes or range(1, len(units) // 2 + 1):
        if not 1 <= size <= len(units) // 2:
            raise ScoreError(f"stability: two disjoint sets of {size} need {2 * size} units, there are {len(units)}")
        found = np.array([_agreement(units, size, k, rng) for rng in _generators(seed, n_splits)])
        correlation, jaccard = found.T
        rows.append(
            {
                "units": size,
                "jaccard": jaccard.mean(),
                **dict(zip(("low", "high"), np.quantile(jaccard, BAND), strict=True)),
                "spearman": correlation.mean(),
                "chance": _chance(k, n_heads),
            }
        )
    return pd.DataFrame(rows)


def _chance(k: int, n_heads: int) -> float:
    """Mean Jaccard overlap of two random K-sets: the hypergeometric mean of |A∩B| / (2K − |A∩B|)."""
    from scipy.stats import hypergeom

    shared = np.arange(k + 1)
    return float((hypergeom.pmf(shared, n_heads, k, k) * shared / (2 * k - shared)).sum())


def _units(scores: HeadScores, user: str | None, k: int) -> np.ndarray:
    units = scores.samples(user).flatten(1).numpy()
    if len(units) < 2:
        raise ScoreError("reliability needs at least two users, or two examples of a user")
    if not 1 <= k <= units.shape[1]:
        raise ScoreError(f"reliability: asked for the top {k} of {units.shape[1]} heads")
    return units


def _generators(seed: int, n: int) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, index]) for index in range(n)]


def _agreement(units: np.ndarray, size: int, k: int, rng: np.random.Generator) -> tuple[float, float]:
    """Spearman correlation and top-K Jaccard overlap of two disjoint random sets of units."""
    order = rng.permutation(len(units))
    one, two = units[order[:size]].mean(0), units[order[size : 2 * size]].mean(0)
    tops = [set(np.argsort(-mean, kind="stable")[:k]) for mean in (one, two)]
    return float(spearmanr(one, two).statistic), len(tops[0] & tops[1]) / len(tops[0] | tops[1])
