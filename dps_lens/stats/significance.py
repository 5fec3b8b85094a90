"""Which heads matter in a population of users, with many heads looked at."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args
from warnings import warn

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control, t
from torch import Tensor

from dps_lens.checks import check_number, check_seed, check_whole
from dps_lens.errors import ScoreError
from dps_lens.heads import Head
from dps_lens.result import Result
from dps_lens.scores import HeadScores
from dps_lens.stats.bootstrap import BLOCK, resampled_t, t_of
from dps_lens.stats.skew import is_skewed, usual_skewness

if TYPE_CHECKING:
    import pandas

Correction: TypeAlias = Literal["max_t", "bh", "bootstrap_t"]
MIN_USERS = 6


@dataclass(frozen=True, eq=False, repr=False)
class Significance(Result):
    """Two-sided tests of every head's mean over users.

    Attributes:
        p: p-values, corrected for the number of heads.
        mean: mean over users.
        skewness: bias-adjusted skewness over users; NaN where a head does not vary.
        above_noise: False where the mean is within what the model's number format alone can make.
        alpha: the level.
        correction: `"max_t"`, `"bh"` or `"bootstrap_t"`.
        manifest: settings, `n_users`, and `smallest_p`, below which no p-value can lie.
    """

    stem: ClassVar[str] = "significance"

    p: Float[Tensor, "layer head"]
    mean: Float[Tensor, "layer head"]
    skewness: Float[Tensor, "layer head"]
    above_noise: Bool[Tensor, "layer head"]
    alpha: float
    correction: Correction
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        found = f"{int(self.significant.sum())} of {self.p.numel()} heads at {self.alpha:g}, {self.correction}"
        least = f"no p below {self.manifest['smallest_p']:.2g}" if self.manifest.get("smallest_p") else ""
        return "; ".join(part for part in (found, least, self.caveat) if part)

    @property
    def significant(self) -> Bool[Tensor, "layer head"]:
        """Heads called significant; never those within the noise floor."""
        return (self.p <= self.alpha) & self.above_noise

    @property
    def skewed(self) -> bool:
        """Whether effects are so skewed over users that `"max_t"` and `"bh"` call too many heads."""
        return is_skewed(self.skewness.numpy(), self.manifest["n_users"])

    @property
    def caveat(self) -> str:
        """What the p-values cannot promise; empty where they hold their level."""
        if self.correction == "bootstrap_t" or not self.skewed:
            return ""
        mean, usual = float(self.skewness.abs().nanmean()), usual_skewness(self.manifest["n_users"])
        return (
            f"effects are skewed over users (mean |skewness| {mean:.1f}, usual {usual:.1f}), where {self.correction!r} "
            "calls heads of mean 0 more often than alpha; correction='bootstrap_t' does not"
        )

    def to_frame(self) -> "pandas.DataFrame":
        """One row a head, smallest p first."""
        import pandas as pd

        layers, heads = np.indices(self.p.shape).reshape(2, -1)
        frame = pd.DataFrame(
            {
                "name": [str(Head(int(layer), int(head))) for layer, head in zip(layers, heads, strict=True)],
                "mean": self.mean.flatten(),
                "p": self.p.flatten(),
                "skewness": self.skewness.flatten(),
                "above_noise": self.above_noise.flatten(),
                "significant": self.significant.flatten(),
            }
        )
        return frame.sort_values("p", kind="stable", ignore_index=True)


def significant_heads(
    scores: HeadScores, *, correction: Correction = "max_t", alpha: float = 0.05, n_flips: int = 10_000, seed: int = 0
) -> Significance:
    """Test the mean of every head over users.

    Args:
        scores: of several users; a single user's map supports no such claim.
        correction: `"max_t"` flips the signs of whole users and compares each head's |t| with the largest
            |t| over heads: family-wise error, exact where effects are symmetric about 0. `"bh"` controls the false
            discovery rate of t-tests over users (Benjamini–Hochberg), which assume normal effects. `"bootstrap_t"`
            compares each head's t with the largest and the smallest t over heads of resampled users: family-wise
            error, for skewed effects too; it finds less where users are few.
        alpha: level.
        n_flips: random sign flips of `"max_t"`, or resamples of `"bootstrap_t"`, with add-one p-values. Where there
            are no more sign patterns than that, all are taken.
        seed: of the flips.

    Raises:
        ScoreError: fewer than 6 users, NaN scores, or no p-value can reach `alpha`.

    Warns:
        UserWarning: heads were called, and effects are too skewed over users for this correction.
    """
    if correction not in get_args(Correction):
        known = ", ".join(map(repr, get_args(Correction)))
        raise ScoreError(f"significant_heads: correction {correction!r} is unknown; use one of {known}")
    check_number(ScoreError, "significant_heads: alpha", alpha, above=0, most=0.5)
    check_whole(ScoreError, "significant_heads: n_flips", n_flips, least=1)
    check_seed(ScoreError, "significant_heads: seed", seed)
    scores.check_defined("significant_heads")
    samples = scores.samples().numpy()
    n_users = len(samples)
    if n_users < MIN_USERS:
        raise ScoreError(
            f"significant_heads: {n_users} users have {2**n_users} patterns of signs, too few for a claim about a "
            f"population; score at least {MIN_USERS} users, or read scores.ci()"
        )
    least = _smallest_p(correction, n_users, n_flips)
    if least > alpha:
        raise ScoreError(
            f"significant_heads: no p-value of {n_users} users and n_flips={n_flips} lies below {least:.2g}, which is "
            f"above alpha={alpha:g}; use more of both, or correction='bh'"
        )
    flat = samples.reshape(n_users, -1)
    # Where users hardly differ, rounding can tell the observed signs from themselves.
    p = np.maximum(_P[correction](flat, n_flips, np.random.default_rng(seed)), least).reshape(samples.shape[1:])
    mean = torch.from_numpy(samples.mean(0))
    floor = scores.noise_floor.of_mean(len(scores.values)) if scores.noise_floor else 0.0
    manifest = {
        "n_users": n_users,
        "n_flips": n_flips if correction != "bh" else None,
        "smallest_p": least or None,
        "seed": seed,
    }
    found = Significance(torch.from_numpy(p), mean, scores.skewness(), mean.abs() > floor, alpha, correction, manifest)
    if found.caveat and found.significant.any():
        warn(f"significant_heads: {found.caveat}", stacklevel=2)
    return found


def max_t_p(
    effects: Float[np.ndarray, "user test"], *, n_flips: int = 10_000, seed: int = 0
) -> Float[np.ndarray, " test"]:
    """Two-sided p-values of means over users, family-wise over tests: the `"max_t"` of `significant_heads`."""
    p = _max_t(effects, n_flips, np.random.default_rng(seed))
    return np.maximum(p, smallest_p(len(effects), n_flips))


def smallest_p(n_users: int, n_flips: int) -> float:
    """Below which no p of `max_t_p` can lie."""
    return _smallest_p("max_t", n_users, n_flips)


def _smallest_p(correction: Correction, n_users: int, n_flips: int) -> float:
    if correction == "bh":
        return 0.0
    if correction == "bootstrap_t":
        return 2 / (n_flips + 1)
    return 0.5 ** (n_users - 1) if _all_fit(n_users, n_flips) else 1 / (n_flips + 1)


def _all_fit(n_users: int, n_flips: int) -> bool:
    """Whether all patterns of signs can be taken; a pattern and its opposite have the same |t|."""
    return 2 ** (n_users - 1) <= n_flips


def _max_t(flat: Float[np.ndarray, "user head"], n_flips: int, rng: np.random.Generator) -> Float[np.ndarray, " head"]:
    n, square = len(flat), (flat**2).mean(0)
    observed = np.abs(t_of(flat.mean(0), square, n))
    everything = _all_fit(n, n_flips)
    signs = _patterns(n) if everything else rng.choice([-1.0, 1.0], size=(n_flips, n))
    blocks = np.array_split(signs, -(-len(signs) // BLOCK))  # so that a large model's heads fit into memory
    largest = np.concatenate([np.abs(t_of(block @ flat / n, square, n)).max(1) for block in blocks])
    add = 0 if everything else 1
    return (add + _reached(largest, observed)) / (add + len(signs))


def _patterns(n: int) -> Float[np.ndarray, "pattern user"]:
    """All patterns of signs of which the first is positive; one of them leaves everybody as observed."""
    bits = np.arange(2 ** (n - 1))[:, None] >> np.arange(n) & 1
    return 1.0 - 2.0 * bits[:, ::-1]


def _bootstrap_t(
    flat: Float[np.ndarray, "user head"], n_flips: int, rng: np.random.Generator
) -> Float[np.ndarray, " head"]:
    observed = t_of(flat.mean(0), (flat**2).mean(0), len(flat))
    extremes = [(drawn.max(1), -drawn.min(1)) for drawn in resampled_t(flat, n_flips, rng)]
    largest, smallest = (np.concatenate(blocks) for blocks in zip(*extremes, strict=True))
    above, below = _reached(largest, observed), _reached(smallest, -observed)
    return np.minimum(1.0, 2 * (1 + np.minimum(above, below)) / (n_flips + 1))


def _bh(flat: Float[np.ndarray, "user head"], n_flips: int, rng: np.random.Generator) -> Float[np.ndarray, " head"]:
    observed = np.abs(t_of(flat.mean(0), (flat**2).mean(0), len(flat)))
    return false_discovery_control(2 * t.sf(observed, len(flat) - 1))


_P = {"max_t": _max_t, "bh": _bh, "bootstrap_t": _bootstrap_t}


def _reached(null: Float[np.ndarray, " draw"], observed: Float[np.ndarray, " head"]) -> Float[np.ndarray, " head"]:
    """How many draws are at least as large as each observation, but for rounding."""
    least = observed - 1e-9 * np.abs(np.nan_to_num(observed, posinf=0, neginf=0))
    return (len(null) - np.searchsorted(np.sort(null), least, side="left")).astype(float)
