"""What overlaps are read beside: random sets of the same layers, and the halves of one user's own examples."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from dps_lens.scores import HeadScores
from dps_lens.stats.reliability import BAND

if TYPE_CHECKING:
    import pandas

MEASURES = ("jaccard", "null_mean", "null_low", "null_high", "p", "mid_p")


def compare_sets(
    chosen: Bool[Tensor, "layer head"],
    other: Bool[Tensor, "layer head"],
    dropped: Bool[Tensor, "layer head"],
    n_null: int,
    rng: np.random.Generator,
) -> tuple[float, ...]:
    """The measures of one pair, in the order of `MEASURES`."""
    shared, null = int((chosen & other).sum()), null_shared(chosen, other, dropped, n_null, rng)
    jaccard, *jaccards = jaccard_of(np.array([shared, *null]), int(chosen.sum() + other.sum()))
    low, high = np.quantile(jaccards, BAND)
    more, equal = (null > shared).sum(), (null == shared).sum()
    p = (1 + more + equal) / (n_null + 1)
    mid_p = (more + rng.random() * (1 + equal)) / (n_null + 1)
    return jaccard, float(np.mean(jaccards)), low, high, p, mid_p


def null_shared(
    chosen: Bool[Tensor, "layer head"],
    other: Bool[Tensor, "layer head"],
    dropped: Bool[Tensor, "layer head"],
    n: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Heads shared with `other` by random sets that have the layers of `chosen` and avoid `dropped`.

    Within a layer this number is hypergeometric, whichever of the two sets is random.
    """
    drawn, good, bad = (mask.sum(1).numpy() for mask in (chosen, other & ~dropped, ~other & ~dropped))
    layers = (drawn > 0) & (good > 0)
    return rng.hypergeometric(good[layers], bad[layers], drawn[layers], size=(n, int(layers.sum()))).sum(1)


def jaccard_of(shared: np.ndarray, total: int) -> np.ndarray:
    """From the number of shared heads and the sum of both sizes; two empty sets are alike."""
    return shared / (total - shared) if total else np.ones(shared.shape)


def ceiling_of(
    scores: HeadScores, k: int, n_dropped: int, n_splits: int, seed: int
) -> tuple["pandas.DataFrame | None", int | None]:
    """Overlap of random halves within and between users, and the examples in each half."""
    import pandas as pd

    rows = {user: scores.rows(user) for user in scores.users if len(scores.rows(user)) >= 2}
    if len(rows) < 2:
        return None, None
    # Fewer examples make noisier tops, so every half of every user has the same number.
    half = min(len(own) for own in rows.values()) // 2
    values = scores.values.double().flatten(1).numpy()
    agreement = np.zeros((len(rows), len(rows)))
    for split in range(n_splits):
        rng = np.random.default_rng([seed, split])
        orders = [rng.permutation(own) for own in rows.values()]
        one = np.stack([values[order[:half]].mean(0) for order in orders])
        two = np.stack([values[order[half : 2 * half]].mean(0) for order in orders])
        agreement += top_agreement(one, two, k, n_dropped) / n_splits
    within = agreement.diagonal()
    between = (agreement.sum(1) - within) / (len(rows) - 1)
    columns = {"user": list(rows), "within": within, "between": between, "difference": within - between}
    return pd.DataFrame(columns), half


def top_agreement(one: np.ndarray, two: np.ndarray, k: int, n_dropped: int) -> np.ndarray:
    """Jaccard overlap of each row's top `k` in `one`, without the best `n_dropped` of `two`, and each in `two`."""
    ranked = np.argsort(-one, axis=1, kind="stable")[:, : k + n_dropped]
    place = np.argsort(np.argsort(-two, axis=1, kind="stable"), axis=1)
    places = place[:, ranked].swapaxes(0, 1)  # (row of one, row of two, rank in one)
    free = places >= n_dropped
    kept = free & (free.cumsum(-1) <= k)
    return jaccard_of((kept & (places < k)).sum(-1), 2 * k)
