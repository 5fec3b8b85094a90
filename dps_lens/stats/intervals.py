"""Intervals over users, and over users and random draws at once."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.scores import t_quantile

if TYPE_CHECKING:
    import pandas


def user_means(values: Float64[Tensor, "example ..."], user_ids: Sequence[str]) -> np.ndarray:
    """Mean of each user's examples, in order of appearance."""
    owners = np.array(user_ids)
    return np.array([values.numpy()[owners == user].mean(0) for user in dict.fromkeys(user_ids)])


def interval(values: np.ndarray, level: float = 0.95) -> dict[str, float]:
    """Mean of user means with a Student's t interval; NaN bounds for a single user."""
    mean, n = float(values.mean()), len(values)
    half = float(t_quantile(n - 1, level) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half}


def ratio_interval(
    numerator: Float[np.ndarray, " user"], denominator: Float[np.ndarray, " user"], level: float = 0.95
) -> dict[str, float]:
    """Ratio of two means over the same users, with Fieller's interval.

    The interval holds every ratio ρ for which a t-test of `numerator − ρ · denominator` over users does not
    reject. Where the denominator's own interval spans 0 it is unbounded, and mean and bounds are NaN.
    """
    n, nothing = len(numerator), {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
    if n < 2:
        return nothing
    (a, b), covariance = (numerator.mean(), denominator.mean()), np.cov(numerator, denominator) / n
    square = t_quantile(n - 1, level) ** 2
    # (a - r b)^2 = t^2 var(a - r b) is quadratic in r.
    lead = b**2 - square * covariance[1, 1]
    if lead <= 0:
        return nothing
    middle = a * b - square * covariance[0, 1]
    root = np.sqrt(max(middle**2 - lead * (a**2 - square * covariance[0, 0]), 0.0))
    return {"mean": float(a / b), "low": float((middle - root) / lead), "high": float((middle + root) / lead)}


def crossed_interval(values: Float[np.ndarray, "draw user"], level: float = 0.95) -> dict[str, float]:
    """Grand mean of draws × users, with an interval for new draws and new users.

    The squared standard error adds the variance of draw means and of user means. Both hold the residual, so
    that it is subtracted once, unless less than the larger of the two would be left: where residuals are all
    there is, the interval is a little wide (97%). Degrees of freedom by Satterthwaite. NaN bounds for a
    single draw or user.
    """
    mean, (draws, users) = float(values.mean()), values.shape
    if min(draws, users) < 2:
        return {"mean": mean, "low": float("nan"), "high": float("nan")}
    of_draw, of_user = values.mean(1), values.mean(0)
    freedoms = np.array([draws - 1, users - 1, (draws - 1) * (users - 1)])
    residual = ((values - of_draw[:, None] - of_user + mean) ** 2).sum() / freedoms[2]
    parts = np.array([of_draw.var(ddof=1) / draws, of_user.var(ddof=1) / users, -residual / values.size])
    if parts.sum() < parts.max():
        parts *= np.arange(len(parts)) == parts.argmax()
    freedom = parts.sum() ** 2 / (parts**2 / freedoms).sum() if parts.any() else 1.0
    half = float(t_quantile(freedom, level) * parts.sum() ** 0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def add_one_p(observed: float, null: Float[np.ndarray, " draw"]) -> float:
    """One-sided p-value: share of the null at least as large, counting the observation itself."""
    return float((1 + (null >= observed - 1e-12).sum()) / (len(null) + 1))


def sets_for_p(level: float) -> int:
    """How few random sets can give a one-sided add-one p-value of 1 − level."""
    return math.ceil(round(1 / (1 - level), 6)) - 1


def sets_for_range(level: float) -> int:
    """How few random sets have a range that holds a new one with probability `level`."""
    return math.ceil(round(2 / (1 - level), 6)) - 1


def range_of_next(drawn: Float[np.ndarray, " draw"], level: float = 0.95) -> tuple[float, float]:
    """Bounds between which the next draw of the same kind lies with probability `level`, whatever their distribution.

    Order statistics, interpolated: the next draw is as likely to fall below the first of n as between any neighbours or
    above the last, with 1 / (n + 1). NaN for fewer draws than `sets_for_range(level)`, whose range holds it less often.
    """
    if len(drawn) < sets_for_range(level):
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="weibull")
    return float(low), float(high)


def columns(name: str, values: dict[str, float]) -> dict[str, float]:
    """An interval as columns of a table: `name`, `name_low`, `name_high`."""
    return {name if end == "mean" else f"{name}_{end}": value for end, value in values.items()}


def jackknife(
    statistic: "Callable[[pandas.DataFrame], float]", rows: "pandas.DataFrame", level: float = 0.95
) -> dict[str, float]:
    """A statistic of all rows with a Student's t interval from leaving out one user at a time.

    For the mean of user means this is the t interval of `interval`.
    """
    mean, users = statistic(rows) if len(rows) else math.nan, list(dict.fromkeys(rows["user"]))
    n = len(users)
    if n < 2:
        return {"mean": mean, "low": math.nan, "high": math.nan}
    without = np.array([statistic(rows[rows["user"] != user]) for user in users])
    pseudo = n * mean - (n - 1) * without
    half = float(t_quantile(n - 1, level) * pseudo.std(ddof=1) / n**0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half}
