"""Comparisons of families over the users of one `SetEffects`."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

import dps_lens as dps
from dps_lens.analysis.effects import MEASURES
from dps_lens.analysis.intervals import interval, user_means
from dps_lens.scores import HeadScores

SHOWN = ("family", "k", "measure", "mean", "low", "high", "percent", "percent_low", "percent_high")
AGAINST = ("control", "control_low", "control_high", "difference", "difference_low", "difference_high", "p")


def by_user(effects: dps.SetEffects, family: str, k: int, measure: str) -> Float[np.ndarray, " user"]:
    """A measure of one family and K, a mean a user, in the order of the users."""
    at = (slice(None), effects.families.index(family), effects.ks.index(k), 0)
    weights: Mapping[str, float] = MEASURES[measure].weights
    return user_means(sum(weight * effects.chosen[name][at] for name, weight in weights.items()), effects.user_ids)  # type: ignore[arg-type]


def paired(
    effects: dps.SetEffects, one: str, others: Sequence[str], k: int, measure: str = "taken"
) -> list[dict[str, object]]:
    """How much more one family takes than each other, over the same users; level corrected for their number."""
    level, own = 1 - 0.05 / len(others), by_user(effects, one, k, measure)
    return [
        {"family": one, "than": other, "k": k, **interval(own - by_user(effects, other, k, measure), level)}
        for other in others
    ]


def shown(effects: dps.SetEffects, measures: Sequence[str]) -> pd.DataFrame:
    """The rows of some measures, with bands and p where random sets were measured."""
    frame = effects.to_frame()
    frame = frame[frame["measure"].isin(measures)]
    columns = [name for name in (*SHOWN, *AGAINST) if name in frame and frame[name].notna().any()]
    return frame[columns].reset_index(drop=True)


def papers(scores: HeadScores) -> HeadScores:
    """The paper's PCS of scores with a contrast: what is lost below the own profile, whatever is lost without."""
    return HeadScores(
        scores.components["own"],
        example_ids=scores.example_ids,
        user_ids=scores.user_ids,
        nll=scores.nll,
        manifest=scores.manifest,
    )
