"""How a model ranks the answers of an example."""

import numpy as np
from jaxtyping import Float


def measures_of_ranks(
    nll: Float[np.ndarray, "example answer"], length: Float[np.ndarray, "example answer"], *, per_token: bool = True
) -> dict[str, Float[np.ndarray, " example"]]:
    """What the likelihoods of several answers say about the user's own one.

    `accuracy`: whether it is the likeliest, ties shared; `chance`: one over the number of answers; `margin`: its
    log-probability beyond the mean of the rejected ones. Of whole answers, whatever `per_token` says, as their
    probabilities are: `probability` of the own answer among them, and `overconfidence`, the probability of the
    likeliest answer minus whether that is the own one, 0 on average for a calibrated model.

    Args:
        nll: mean over the tokens of each answer, the user's own first; NaN where an example has fewer answers.
        length: tokens of each answer.
        per_token: compare means over tokens, so that long and short answers are alike; else whole answers.
    """
    there = ~np.isnan(nll).all(1)
    whole = np.where(there[:, None], -nll * length, 0.0)
    compared = np.where(there[:, None], -nll, 0.0) if per_token else whole
    shares = np.exp(whole - np.nanmax(whole, axis=1, keepdims=True))
    shares /= np.nansum(shares, axis=1, keepdims=True)
    measured = {
        "accuracy": _first_is_best(compared),
        "chance": 1 / (~np.isnan(compared)).sum(1),
        "margin": compared[:, 0] - np.nanmean(compared[:, 1:], axis=1),
        "probability": shares[:, 0],
        "overconfidence": np.nanmax(shares, axis=1) - _first_is_best(whole),
    }
    return {name: np.where(there, values, np.nan) for name, values in measured.items()}


def _first_is_best(values: Float[np.ndarray, "example answer"]) -> Float[np.ndarray, " example"]:
    """1 where the first answer is the best, less where it shares that place."""
    best = values == np.nanmax(values, axis=1, keepdims=True)
    return best[:, 0] / best.sum(1)
