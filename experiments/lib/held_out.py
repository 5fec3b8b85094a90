"""Comparisons of families over the users of one `SetEffects`."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float

import dps_lens as dps
from dps_lens.stats.intervals import interval
from dps_lens.validation.effects import FULL, Share
from experiments.lib.tables import ends

EDITED = ("gain_removed", "gain_removed_other", "task_cost", "neutral_cost")
SHOWN = ("family", "k", "measure", "mean", "low", "high", "percent", "percent_low", "percent_high")
AGAINST = ("control", "control_low", "control_high", "difference", "difference_low", "difference_high", "p")


def by_user(effects: dps.SetEffects, family: str, k: int, measure: str) -> Float[np.ndarray, " user"]:
    """A measure of one family and K, a mean a user, in the order of the users."""
    frame = effects.by_user()
    return frame.loc[(frame["family"] == family) & (frame["k"] == k), measure].to_numpy()


def beyond_random(effects: dps.SetEffects, family: str, k: int, measure: str) -> dict[str, float]:
    """How much more of a measure a family has than its random sets."""
    frame = effects.to_frame().set_index(["family", "k", "measure"])
    return ends(frame.loc[(family, k, measure)], "difference")


def paired(
    effects: dps.SetEffects, one: str, others: Sequence[str], k: int, measure: str = "gain_removed"
) -> pd.DataFrame:
    """How much more one family takes than each other, over the same users; level corrected for their number."""
    own = by_user(effects, one, k, measure)
    return pd.DataFrame(
        {
            "family": one,
            "than": other,
            "k": k,
            **interval(own - by_user(effects, other, k, measure), 1 - 0.05 / len(others)),
        }
        for other in others
    )


def full(effects: dps.SetEffects, part: Share = "all") -> pd.DataFrame:
    """NLLs and gains of the full model."""
    frame = effects.to_frame(part=part)
    return frame.loc[frame["family"] == FULL, ["measure", "mean", "low", "high"]]


def shown(effects: dps.SetEffects, measures: Sequence[str] = EDITED, part: Share = "all") -> pd.DataFrame:
    """The rows of some measures, with bands and p where random sets were measured."""
    frame = effects.to_frame(part=part)
    frame = frame[frame["measure"].isin(measures)]
    columns = [name for name in (*SHOWN, *AGAINST) if name in frame and frame[name].notna().any()]
    return frame[columns].reset_index(drop=True)


def copying(effects: dps.SetEffects) -> pd.DataFrame:
    """The gain, and what is taken of it, in tokens that are copied from the profile, and in the rest."""
    parts: tuple[Share, ...] = ("copied", "rest")
    return pd.concat([shown(effects, ("gain", "gain_removed"), part).assign(tokens=part) for part in parts])


def papers(scores: dps.HeadScores) -> dps.HeadScores:
    """The paper's PCS of scores with a contrast: what is lost below the own profile, whatever is lost without."""
    return replace(scores, values=scores.components["own"], components={})
