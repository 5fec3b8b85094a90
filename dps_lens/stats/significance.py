"""Which heads matter in a population of users, with many heads looked at."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import false_discovery_control, t
from torch import Tensor

from dps_lens.errors import ScoreError
from dps_lens.heads import Head
from dps_lens.result import Result
from dps_lens.scores import HeadScores

if TYPE_CHECKING:
    import pandas

Correction: TypeAlias = Literal["max_t", "bh"]
MIN_USERS = 5


@dataclass(frozen=True, eq=False, repr=False)
class Significance(Result):
    """Two-sided tests of every head's mean over users.

    Attributes:
        p: p-values, corrected for the number of heads.
        mean: mean over users.
        above_noise: False where the mean is within what the model's number format alone can make.
        alpha: the level.
        correction: `"max_t"` or `"bh"`.
        manifest: settings.
    """

    stem: ClassVar[str] = "significance"

    p: Float[Tensor, "layer head"]
    mean: Float[Tensor, "layer head"]
    above_noise: Bool[Tensor, "layer head"]
    alpha: float
    correction: Correction
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        return f"{int(self.significant.sum())} of {self.p.numel()} heads at {self.alpha:g}, {self.correction}"

    @property
    def significant(self) -> Bool[Tensor, "layer head"]:
        """Heads called significant; never those within the noise floor."""
        return (self.p <= self.alpha) & self.above_noise

    def to_frame(self) -> "pandas.DataFrame":
        """One row a head, smallest p first."""
        import pandas as pd

        layers, heads = np.indices(self.p.shape).reshape(2, -1)
        frame = pd.DataFrame(
            {
                "name": [str(Head(int(layer), int(head))) for layer, head in zip(layers, heads, strict=True)],
                "mean": self.mean.flatten(),
                "p": self.p.flatten(),
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
            |t| over heads (family-wise error; add-one p-values). `"bh"` controls the false discovery rate of
            t-tests over users (Benjamini–Hochberg).
        alpha: level.
        n_flips: random sign flips for `"max_t"`.
        seed: of the flips.

    Raises:
        ScoreError: fewer than 5 users.
    """
    samples = scores.samples().numpy()
    n_users = len(samples)
    if n_users < MIN_USERS:
        raise ScoreError(f"significant_heads: {n_users} users; at least {MIN_USERS} are needed for a population claim")
    flat = samples.reshape(n_users, -1)
    observed = np.abs(_t(flat.mean(0), (flat**2).mean(0), n_users))
    if correction == "bh":
        p = false_discovery_control(2 * t.sf(observed, n_users - 1))
    elif correction == "max_t":
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(n_flips, n_users))
        largest = np.abs(_t(signs @ flat / n_users, (flat**2).mean(0), n_users)).max(1)
        p = (1 + (largest[:, None] >= observed - 1e-12).sum(0)) / (n_flips + 1)
    else:
        raise ScoreError(f"significant_heads: correction {correction!r} is unknown; use 'max_t' or 'bh'")
    shape = samples.shape[1:]
    mean = torch.from_numpy(flat.mean(0).reshape(shape))
    floor = scores.noise_floor.of_mean(len(scores.values)) if scores.noise_floor else 0.0
    manifest = {"n_users": n_users, "n_flips": n_flips if correction == "max_t" else None, "seed": seed}
    above = mean.abs() > floor
    return Significance(torch.from_numpy(p.reshape(shape)), mean, above, alpha, correction, manifest)


def _t(mean: np.ndarray, mean_square: np.ndarray, n: int) -> np.ndarray:
    """Student's t from first and second moments; 0 where nothing varies and nothing differs from 0."""
    variance = np.maximum(mean_square - mean**2, 0) * n / (n - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(mean == 0, 0.0, mean / np.sqrt(variance / n))
