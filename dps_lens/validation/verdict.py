"""A verdict in words: what a set of heads costs, and what it removes, beside random sets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dps_lens.stats.intervals import sets_for_p
from dps_lens.stats.skew import caveat

COSTS = ("task_cost", "neutral_cost")
REMOVED = ("gain_removed_other", "gain_removed")
PATCHED = ("necessity_other", "sufficiency_other")
TOLD = (*COSTS, *REMOVED, *PATCHED)
"""Measures that a verdict is about."""

_OVER = {"gain_removed_other": "another user", "gain_removed": "no profile"}
_PATCHES = {
    "necessity_other": ("Necessity", "patching them from another user's run loses"),
    "sufficiency_other": ("Sufficiency", "patching them into another user's run brings back"),
}


def stands_out(row: Mapping[Any, Any], alpha: float = 0.05) -> int:
    """1 where the chosen set does more than random ones, −1 where it does less, 0 where neither can be told.

    More: the interval of the difference, over users and random sets, lies above 0 **and** the chosen set's rank among
    them gives p ≤ alpha. The interval alone would be about the mean of all sets, beside which one more random set
    often stands out.

    Args:
        row: with `difference_low`, `difference_high`, `p` and `p_less`, as of `SetEffects.to_frame`; without them, or
            where they are NaN, nothing can be told.
        alpha: of each one-sided test.
    """
    low, high, p, less = (row.get(name, math.nan) for name in ("difference_low", "difference_high", "p", "p_less"))
    if low > 0 and p <= alpha + 1e-12:
        return 1
    return -int(high < 0 and less <= alpha + 1e-12)


def verdict(
    shown: str,
    rows: Mapping[str, Mapping[str, Any]],
    gains: Mapping[str, Mapping[str, float]],
    *,
    n_random: int,
    n_users: int,
    level: float,
) -> str:
    """The sentences that the numbers of one set support: costs first, then what it removes, then patches.

    Args:
        shown: the set, in words.
        rows: measure → its row, of those in `TOLD` that were measured; without a p where random sets were not.
        gains: measure of what is removed → the whole gain with its interval over users.
        n_random: how many random sets were measured.
        n_users: how many users.
        level: of intervals, and 1 − alpha of each one-sided test.
    """
    helps = {name: gain["low"] > 0 for name, gain in gains.items()}
    if any(math.isnan(gain["low"]) for gain in gains.values()):
        return "One user gives no interval over users, so nothing is claimed."
    if not any(helps.values()):
        said = "; ".join(f"over {_OVER[name]} {_said(gain)}" for name, gain in gains.items())
        return f"Here the profile does not reliably help the model (gain {said}); there is little to remove."
    told = {name for name, row in rows.items() if "difference" in row}
    if n_random and not {"gain_removed", "task_cost"} <= told:
        return "Random sets were not measured both with and without the own profile, so nothing is claimed."
    if n_random < (needed := sets_for_p(level)):
        lead = next(name for name in gains if helps[name])
        return (
            f"The profile helps the model (gain over {_OVER[lead]} {_said(gains[lead])}); {n_random} random sets are "
            f"too few to claim anything of these heads at {level:.0%}, {needed} are needed."
        )
    alpha, removed = 1 - level, [name for name in REMOVED if name in told]
    found = [_costs(shown, rows, told, alpha)]
    if "gain_removed_other" not in rows:
        found.append("Nothing was measured with another user's profile, so the gain is that over no profile.")
    found += [_removed(name, rows[name], gains[name], alpha) for name in removed]
    found += [_patched(name, rows[name], alpha) for name in PATCHED if name in told and helps["gain_removed_other"]]
    if untold := [name for name in TOLD if name in rows and name not in told]:
        found.append(f"Random sets were not measured for {', '.join(untold)}, so nothing is claimed of these.")
    return " ".join([*found, _caveat([rows[name]["skewness"] for name in removed], n_users)]).strip()


def _costs(shown: str, rows: Mapping[str, Mapping[str, Any]], told: set[str], alpha: float) -> str:
    by = _beside(rows["task_cost"], alpha)
    task = {
        1: f"{shown[0].upper()}{shown[1:]} cost the same task without a profile more than random heads of the same "
        f"layers do, by {by}",
        0: f"What {shown} cost the same task without a profile cannot be told from what random heads of the same "
        f"layers cost ({by})",
        -1: f"{shown[0].upper()}{shown[1:]} cost the same task without a profile less than random heads of the same "
        f"layers do ({by})",
    }[stands_out(rows["task_cost"], alpha)]
    if "neutral_cost" not in told:
        return f"{task}."
    by = _beside(rows["neutral_cost"], alpha)
    neutral = {
        1: f"on neutral text they cost more than random heads do, by {by}",
        0: f"on neutral text their cost cannot be told from that of random heads ({by})",
        -1: f"on neutral text they cost less than random heads do ({by})",
    }[stands_out(rows["neutral_cost"], alpha)]
    return f"{task}; {neutral}."


def _removed(name: str, row: Mapping[str, Any], gain: Mapping[str, float], alpha: float) -> str:
    over, by = _OVER[name], _beside(row, alpha)
    if not gain["low"] > 0:
        return f"The gain over {over} is not reliably above 0 ({_said(gain)}), so nothing is claimed of it."
    return {
        1: f"More of the gain over {over} goes with them than with random heads, by {by}.",
        0: f"Of the gain over {over}, they cannot be told from random heads ({by}).",
        -1: f"Less of the gain over {over} goes with them than with random heads ({by}).",
    }[stands_out(row, alpha)]


def _patched(name: str, row: Mapping[str, Any], alpha: float) -> str:
    (kind, does), by = _PATCHES[name], _beside(row, alpha)
    return {
        1: f"{kind}: {does} more than patching random heads, by {by}.",
        0: f"{kind}: what {does} cannot be told from what random heads do ({by}).",
        -1: f"{kind}: {does} less than patching random heads ({by}).",
    }[stands_out(row, alpha)]


def _caveat(skewness: Sequence[float], n_users: int) -> str:
    """What to say of the most skewed one."""
    known = [value for value in skewness if not math.isnan(value)]
    return caveat(np.array(max(known, key=abs, default=math.nan)), n_users)


def _beside(row: Mapping[str, Any], alpha: float) -> str:
    """The difference to random sets; where its interval alone would tell, the rank that forbids it, too."""
    said, low, high = _said(row, "difference"), row["difference_low"], row["difference_high"]
    if stands_out(row, alpha) or low <= 0 <= high or math.isnan(low):
        return said
    return f"{said}; by its rank among the random sets, p = {row['p' if low > 0 else 'p_less']:.3f}"


def _said(row: Mapping[str, Any], name: str = "") -> str:
    mean, low, high = (row[key] for key in ((name, f"{name}_low", f"{name}_high") if name else ("mean", "low", "high")))
    return f"{mean:.3f} nats per token, interval {low:.3f} to {high:.3f}"
