"""Statistics of maps of users: shares of chosen heads, agreement, and intervals that leave out one user at a time."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import spearmanr

from dps_lens.scores import t_quantile

Maps: TypeAlias = Float[np.ndarray, "user head"]


def top(means: Float[np.ndarray, " head"], k: int) -> Int[np.ndarray, " k"]:
    """The `k` largest, ties by place."""
    return np.argsort(-means, kind="stable")[:k]


def share(means: Float[np.ndarray, " head"], chosen: Int[np.ndarray, " k"]) -> float:
    """Part of everything positive that the chosen heads hold; noise in the rest makes it smaller, never larger."""
    total = np.clip(means, 0, None).sum()
    return float(means[chosen].sum() / total) if total > 0 else 0.0


def halves(n_users: int, n_splits: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Random halves of the users, each also the other way round."""
    found = []
    for split in range(n_splits):
        order = np.random.default_rng([seed, split]).permutation(n_users).tolist()
        one, two = sorted(order[: n_users // 2]), sorted(order[n_users // 2 :])
        found += [(one, two), (two, one)]
    return found


def held_out_share(maps: Maps, k: int, splits: Sequence[tuple[list[int], list[int]]]) -> float:
    """Mean over splits of the share, on one half of the users, of the heads that the other half chose."""
    return float(np.mean([share(maps[two].mean(0), top(maps[one].mean(0), k)) for one, two in splits]))


def jackknife(statistic: Callable[[list[int]], float], n_users: int, level: float = 0.95) -> dict[str, float]:
    """A statistic of users with the interval of leaving out one at a time (Student's t)."""
    everybody = list(range(n_users))
    value = statistic(everybody)
    left = np.array([statistic([user for user in everybody if user != out]) for out in everybody])
    error = float(np.sqrt((n_users - 1) / n_users * ((left - left.mean()) ** 2).sum()))
    half = t_quantile(n_users - 1, level) * error
    return {"mean": value, "low": value - half, "high": value + half}


def leaving_quarters(
    statistic: Callable[[list[int]], float], n_users: int, n: int, seed: int, level: float = 0.95
) -> dict[str, float]:
    """The same for a share between 0 and 1 that is not smooth, such as an overlap: a quarter is left out at a time.

    Shao and Wu's delete-d jackknife over `n` random subsets.
    """
    out, rng = max(1, round(n_users / 4)), np.random.default_rng(seed)
    left = np.array([statistic(sorted(rng.permutation(n_users)[out:].tolist())) for _ in range(n)])
    value = statistic(list(range(n_users)))
    half = float(t_quantile(n_users - 1, level) * np.sqrt((n_users - out) / out) * left.std())
    return {"mean": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


def without(splits: Sequence[tuple[list[int], list[int]]], kept: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The same splits among fewer users."""
    stay = set(kept)
    return [([user for user in one if user in stay], [user for user in two if user in stay]) for one, two in splits]


def agreement(one: Maps, two: Maps, k: int) -> dict[str, float]:
    """Rank correlation of two mean maps, and Jaccard overlap of their top `k`."""
    a, b = one.mean(0), two.mean(0)
    tops = [set(top(mean, k).tolist()) for mean in (a, b)]
    correlation = float(np.asarray(spearmanr(a, b).statistic))
    return {"spearman": correlation, "jaccard": len(tops[0] & tops[1]) / len(tops[0] | tops[1])}
