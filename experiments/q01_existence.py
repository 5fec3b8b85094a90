"""Are there few heads that read the profile, and are they the same ones when anything is drawn anew?

    python -m experiments.q01_existence [--config FILE.yaml] [--out runs/existence]

Question. Is the map of profile-specific PCS sparse, and are its top heads reliable?

Hypotheses. (1) The top 4% of heads hold far more than their number of the summed profile-specific PCS of other users.
(2) The same for the paper's PCS. (3) The top 4% are found again from other examples of the same users, from other
documents in the profile, and under another wording of the task.

Measure. Half of the users choose the top 4% by their mean map. On the other half: the summed PCS of these heads over
the summed positive PCS of all heads (noise adds to the denominator only). Mean over random halves, each also swapped;
the interval leaves out one user at a time. Reliability: Jaccard overlap of two top 4%, and rank correlation of the two
maps; intervals of overlaps leave out a quarter of the users at a time. Every other example is held against the rest;
the newest example with a profile by BM25 against one of randomly drawn documents, and against another wording of the
instruction.

Control. On the first split, both directions: 1,000 random sets of the same layers, disjoint from the chosen one; and
1,000 random flips of the signs of the other half's users, for a map that is symmetric about 0. For overlaps: random
sets of the same layers.

Decision rule. (1), (2): supported if both p, the larger of the two directions, are at most 0.05 and the interval of the
share lies above 0.20, five times 4%; not supported if a p is larger or the interval lies below 0.20; else undecided.
(3): supported if each of the three overlaps has p at most 0.05 and an interval above 1/3 (half of the heads are
shared); not supported if a p is larger or an interval lies below 1/3; else undecided. Three hypotheses, each reported;
no further correction.

Amended after the first run: the intervals of overlaps left out one user at a time, too. An overlap is not smooth, and
they went beyond 0 and 1. A quarter is left out instead (Shao and Wu 1989); no decision changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

import dps_lens as dps
from dps_lens.data import User
from dps_lens.scores import HeadScores
from dps_lens.selection import random_sets
from dps_lens.stats.intervals import add_one_p, columns
from experiments.lib.halves import (
    Maps,
    agreement,
    halves,
    held_out_share,
    jackknife,
    leaving_quarters,
    share,
    top,
    without,
)
from experiments.lib.harness import Claim, Config, Findings, Lab, Outcome, main

FIVEFOLD, HALF_SHARED, ALPHA, N_SUBSETS = 5, 1 / 3, 0.05, 1000
MAPS = {"profile-specific PCS": None, "the paper's PCS": "own"}


class Existence(Config):
    share: float = 0.04
    n_splits: int = 50
    n_null: int = 1000
    variant_users: int = 12
    wording: str = "Think of a short title for this news article:"


def measure(config: Existence, lab: Lab) -> Findings:
    users = lab.users()
    scores = lab.scores(users)
    k = max(1, round(config.share * scores.values[0].numel()))
    shares = pd.DataFrame([{"map": name, **sparsity(scores, of, k, config, lab)} for name, of in MAPS.items()])
    reliable = reliability(scores, users, k, config, lab)
    halved = dps.split_half(scores, k=k, n_splits=200, seed=config.seed)
    maps = {name: scores.mean(of=of).flatten().numpy() for name, of in MAPS.items()}
    curve = pd.DataFrame(
        {"rank": range(1, len(maps["the paper's PCS"]) + 1)} | {n: cumulative(m) for n, m in maps.items()}
    )
    claims = [sparse(row, config) for row in shares.to_dict("records")]
    tables = {"share": shares, "reliability": reliable, "halves of users": halved, "cumulative": curve}
    return Findings(tables, [*claims, found_again(reliable)])


def sparsity(scores: HeadScores, of: str | None, k: int, config: Existence, lab: Lab) -> dict[str, float]:
    """Held-out share of the top `k` with its interval and both nulls."""
    maps = scores.samples(of=of).flatten(1).numpy()
    splits = halves(len(maps), config.n_splits, config.seed)
    found = jackknife(lambda kept: held_out_share(maps, k, without(splits, kept)), len(maps))
    sets, flips, random_shares = [], [], []
    for one, two in splits[:2]:
        chosen, other = top(maps[one].mean(0), k), maps[two]
        null = np.array([share(other.mean(0), drawn) for drawn in matched(chosen, scores, config, lab)])
        sets.append(add_one_p(share(other.mean(0), chosen), null))
        flips.append(add_one_p(float(other[:, chosen].sum(1).mean()), flipped(other[:, chosen].sum(1), config)))
        random_shares.append(null.mean())
    nats = jackknife(lambda kept: chosen_sum(maps, k, without(splits, kept)), len(maps))
    return found | {
        "k": k,
        "random sets": float(np.mean(random_shares)),
        "p random sets": max(sets),
        "p sign flips": max(flips),
        **columns("nats", nats),
    }


def chosen_sum(maps: Maps, k: int, splits: Sequence[tuple[list[int], list[int]]]) -> float:
    """Summed PCS of chosen heads on the other half, nats per token."""
    return float(np.mean([maps[two].mean(0)[top(maps[one].mean(0), k)].sum() for one, two in splits]))


def matched(chosen: np.ndarray, scores: HeadScores, config: Existence, lab: Lab) -> list[np.ndarray]:
    """Random sets of the layers of the chosen heads, as places in a flat map."""
    n_heads = scores.values.shape[2]
    like = dps.HeadSet([divmod(int(place), n_heads) for place in chosen])
    drawn = random_sets(lab.model, like, config.n_null, config.seed)
    return [np.array([head.layer * n_heads + head.head for head in heads]) for heads in drawn]


def flipped(sums: np.ndarray, config: Existence) -> np.ndarray:
    """Means over users under random signs."""
    signs = np.random.default_rng(config.seed).choice([-1.0, 1.0], size=(config.n_null, len(sums)))
    return signs @ sums / len(sums)


def reliability(scores: HeadScores, users: list[User], k: int, config: Existence, lab: Lab) -> pd.DataFrame:
    """How far two maps of the same users agree when examples, documents or wording change."""
    few = users[: config.variant_users]
    newest, others = scores.newest(1), {user.id for user in users[config.variant_users :]}
    newest = newest.without(others) if others else newest
    drawn = config.prompt.config(retrieval="random", seed=config.seed + 1)
    pairs = {
        "examples": (taken(scores, 0), taken(scores, 1)),
        "documents": (newest, lab.scores(few, max_examples=1, prompt_config=drawn)),
        "wording": (newest, lab.scores([reworded(user, config.wording) for user in few], max_examples=1)),
    }
    return pd.DataFrame([{"drawn anew": name, **compared(*pair, k, config)} for name, pair in pairs.items()])


def taken(scores: HeadScores, start: int) -> HeadScores:
    """Every other example of each user."""
    return scores.take([row for user in scores.users for row in scores.rows(user)[start::2]])


def reworded(user: User, wording: str) -> User:
    """The user, asked with another instruction; discovery examples take theirs from the first evaluation example."""
    keyword = user.task.keyword
    asked = [example.input[example.input.find(keyword) + len(keyword) :] for example in user.examples]
    return replace(
        user,
        examples=tuple(replace(e, input=wording + rest) for e, rest in zip(user.examples, asked, strict=True)),
    )


def compared(one: HeadScores, two: HeadScores, k: int, config: Existence) -> dict[str, float]:
    both = [user for user in one.users if user in two.users]
    a, b = (np.stack([scores.mean(user).flatten().numpy() for user in both]) for scores in (one, two))
    row: dict[str, float] = {"users": len(both)}
    overlaps = leaving_quarters(
        lambda kept: agreement(a[kept], b[kept], k)["jaccard"], len(both), N_SUBSETS, config.seed
    )
    ranks = jackknife(lambda kept: agreement(a[kept], b[kept], k)["spearman"], len(both))
    row |= columns("jaccard", overlaps) | columns("spearman", ranks)
    pair = dps.overlap({"one": one, "two": two}, k=k, n_null=config.n_null, seed=config.seed).to_frame().iloc[0]
    return row | {"random sets": float(pair["null_mean"]), "p": float(pair["p"])}


def cumulative(means: np.ndarray) -> np.ndarray:
    """Share of everything positive in the best heads, sample itself: for the eye, not for the decision."""
    ranked = np.sort(np.asarray(means))[::-1]
    return np.cumsum(ranked) / np.clip(ranked, 0, None).sum()


def sparse(row: Mapping[str, Any], config: Existence) -> Claim:
    worst, bound = max(row["p random sets"], row["p sign flips"]), FIVEFOLD * config.share
    outcome: Outcome = "undecided"
    if worst > ALPHA or row["high"] < bound:
        outcome = "not supported"
    elif row["low"] > bound:
        outcome = "supported"
    rule = f"both p at most {ALPHA} and the share's interval above {bound:.2f}"
    return Claim(f"the top {config.share:.0%} hold far more than their number: {row['map']}", rule, row, outcome)


def found_again(reliable: pd.DataFrame) -> Claim:
    rows = reliable.set_index("drawn anew")
    outcome: Outcome = "undecided"
    if (rows["p"] > ALPHA).any() or (rows["jaccard_high"] < HALF_SHARED).any():
        outcome = "not supported"
    elif (rows["jaccard_low"] > HALF_SHARED).all():
        outcome = "supported"
    measured = {name: rows.loc[name, ["jaccard", "p"]].to_dict() for name in rows.index}
    return Claim("top heads are found again", f"each p at most {ALPHA}, each overlap above 1/3", measured, outcome)


if __name__ == "__main__":
    main("existence", __doc__ or "", Existence, measure)
