"""Whether effects are so skewed over users that what assumes symmetry claims too much."""

import numpy as np
from jaxtyping import Float
from scipy.stats import skew

FEW = 10
HARMFUL = 0.12


def skewness_of(values: Float[np.ndarray, " user"]) -> float:
    """Bias-adjusted skewness; NaN for fewer than three values, or where none differ."""
    return float(skew(values, bias=False)) if len(values) > 2 and np.ptp(values) > 0 else float("nan")


def usual_skewness(n: int) -> float:
    """Mean absolute skewness of `n` normal values, from its variance."""
    return float(np.sqrt(2 / np.pi * 6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3))))


def is_skewed(skewness: Float[np.ndarray, "*measure"], n: int) -> bool:
    """Whether skewness is beyond chance and large enough to harm.

    A head that is called by mistake rarely shows it: its sample lacks the user far away from the rest. All measures
    are therefore taken together: their mean absolute skewness is beyond chance at 1.3 times that of normal values (of
    fewer than 64 measures at more, of one at 2.5 times), and harms where it is 0.12 √n, at which a tail of 2.5% holds
    3.5%.

    Args:
        skewness: of one measure, or of many, such as one a head; NaN where a measure does not vary.
        n: how many users.
    """
    known = np.abs(skewness[np.isfinite(skewness)])
    if n < 3 or not known.size:
        return False
    by_chance = usual_skewness(n) * (1 + float(np.clip(2.4 / known.size**0.5, 0.3, 1.5)))
    return bool(known.mean() > max(by_chance, HARMFUL * n**0.5))


def caveat(skewness: Float[np.ndarray, "*measure"], n: int, unit: str = "users") -> str:
    """What to say beside Student's t intervals over users; nothing where they can be trusted."""
    if n < 2:
        return ""
    if is_skewed(skewness, n):
        found = np.nanmean(np.abs(skewness))
        return (
            f"Effects are skewed over {unit} (skewness {found:.1f}, usual for {n} symmetric ones: "
            f"{usual_skewness(n):.1f}), so a 95% interval may cover 80 to 90%."
        )
    if n < FEW:
        return f"{n} {unit} are too few to show skewed effects, of which a 95% interval covers 80 to 90%."
    return ""
