"""Student's t of resampled users, which leans as the users do: intervals and tests for skewed effects."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.errors import ScoreError
from dps_lens.scores import HeadScores

BLOCK = 1000


def t_of(
    mean: Float[np.ndarray, "*draw head"], mean_square: Float[np.ndarray, "*square head"], n: int
) -> Float[np.ndarray, "*draw head"]:
    """Student's t from first and second moments; 0 where nothing varies and nothing differs from 0."""
    variance = np.maximum(mean_square - mean**2, 0) * n / (n - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, mean / np.sqrt(variance / n))


def resampled_t(
    units: Float[np.ndarray, "unit head"], n: int, rng: np.random.Generator
) -> Iterator[Float[np.ndarray, "draw head"]]:
    """t of `n` resamples of the units, each about the units' own mean, a block at a time."""
    size, centred = len(units), units - units.mean(0)
    for start in range(0, n, BLOCK):
        weights = rng.multinomial(size, np.full(size, 1 / size), size=min(BLOCK, n - start)) / size
        yield t_of(weights @ centred, weights @ centred**2, size)


def bootstrap_t_ci(
    scores: HeadScores,
    level: float = 0.95,
    user: str | None = None,
    *,
    of: str | None = None,
    n_resamples: int = 4000,
    seed: int = 0,
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """Interval of the mean by the bootstrap t: `scores.ci` for units that scatter to one side.

    It is closer to its level there, and wider; where users are few and very skewed it falls short, too. One head at a
    time. NaN where there is a single unit; two or three are too few to bound it.

    Args:
        scores: units are users, or the examples of `user`.
        level: of the interval.
        user: one user instead of all.
        of: a component instead of `values`.
        n_resamples: of the units, at least 1000.
        seed: of the resamples.

    Raises:
        ScoreError: the level is no share between 0 and 1, or there are fewer resamples.
    """
    if not 0 < level < 1 or n_resamples < BLOCK:
        raise ScoreError(
            f"bootstrap_t_ci: level {level} must lie between 0 and 1, n_resamples {n_resamples} be {BLOCK} or more"
        )
    samples = scores.samples(user, of=of).numpy()
    n, shape = len(samples), samples.shape[1:]
    if n < 2:
        nothing = torch.full(shape, float("nan"), dtype=torch.float64)
        return nothing, nothing
    units = samples.reshape(n, -1)
    drawn = np.concatenate(list(resampled_t(units, n_resamples, np.random.default_rng(seed))))
    # Order statistics, not interpolated: a resample of one unit alone has an infinite t.
    below, above = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0, method="inverted_cdf")
    mean, error = units.mean(0), units.std(0, ddof=1) / n**0.5
    with np.errstate(invalid="ignore"):  # where nothing varies, 0 times an infinite t
        low, high = (mean - np.where(error > 0, t * error, 0) for t in (above, below))
    return torch.from_numpy(low.reshape(shape)), torch.from_numpy(high.reshape(shape))
