"""Does every user have heads of one's own?

    python -m experiments.q04_users [--config FILE.yaml] [--out runs/users]

Question. Do users share their top heads, are some of them the user's own, and whose heads carry a user's gain best?

Hypotheses. (1) Users share top heads more than chance. (2) A user's own examples agree more with each other than with
other users' examples. (3) Ablating the heads of the user's own examples takes more of the user's gain than ablating
another user's. (4) It takes more than ablating the heads that other users chose together.

Measure. Jaccard overlap of the top 10 by profile-specific PCS, and rank correlation of the maps, between users and
between halves of one user's examples (equal numbers in every half, 100 random splits). Clusters of users by the words
of their histories and by their maps, compared by the adjusted Rand index. Gain taken on the newest headlines by the top
10 of the user's own 4 examples, of another user's 4, of the user's cluster by text, and of all users of other folds.

Control. Overlaps: random sets of the same layers. Clusters: labels permuted 1,000 times. Ablation: 20 random sets of
the same layers for each.

Decision rule. (1) by the interval, over users left out one at a time, of the mean overlap of pairs less that of random
sets; (2) by the interval over users of within − between; (3), (4) by the intervals over users of the paired differences
of the gain taken, at 97.5% each. Supported above 0, not supported below or at 0, else undecided.
"""

import random

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import adjusted_rand_score

import dps_lens as dps
from dps_lens.data import User
from dps_lens.scores import HeadScores
from dps_lens.selection import HeadSource
from dps_lens.stats.intervals import add_one_p, columns, interval
from experiments.lib.halves import jackknife
from experiments.lib.harness import Config, Findings, Lab, above_zero, main
from experiments.lib.held_out import paired, shown

OWN, OTHER, CLUSTER, GLOBAL = "own heads", "another user's heads", "cluster's heads", "global heads"


class Users(Config):
    k: int = 10
    n_clusters: int = 4
    n_random: int = 20
    held_out: int = 2
    n_splits: int = 100
    n_null: int = 1000


def measure(config: Users, lab: Lab) -> Findings:
    users = lab.users()
    scores = lab.scores(users)
    agreed = dps.overlap(scores, k=config.k, n_null=config.n_null, n_splits=config.n_splits, seed=config.seed)
    jaccard, null = agreed.jaccard.numpy(), agreed.null_mean.numpy()
    excess = jackknife(lambda kept: pairs_mean((jaccard - null)[np.ix_(kept, kept)]), len(users))
    shared = pd.DataFrame([{"pairs": len(users) * (len(users) - 1) // 2, "jaccard": pairs_mean(jaccard)}])
    shared = shared.assign(**{"random sets": pairs_mean(null), "p at most 0.05": pairs_mean(agreed.p.numpy() <= 0.05)})
    shared = shared.assign(**columns("excess", excess))
    halved = specificity(agreed, scores, config)
    clusters = dps.cluster_users(users, config.n_clusters, seed=config.seed)
    families: dict[str, HeadSource] = {OWN: scores, OTHER: others_heads(scores, users, config), GLOBAL: scores}
    families[CLUSTER] = clusters.heads(scores, config.k)
    effects = dps.ablation_curve(
        lab.model,
        users,
        families,
        select={OWN: "user"},
        ks=(config.k,),
        n_random=config.n_random,
        max_examples=config.held_out,
        seed=config.seed,
        out=lab.out / "ablated",
    )
    against = paired(effects, OWN, (OTHER, GLOBAL), config.k)
    tables = {
        "overlap": shared,
        "halves": halved,
        "clusters": agreement_of_clusters(clusters, users, scores, config),
        "ablated": shown(effects),
        "own heads take more": against,
    }
    own = halved.set_index(["measure", "pair"]).loc[("jaccard", "difference")]
    read = {"users share top heads more than chance": excess, "some heads are the user's own": own}
    read |= {f"own heads take more than {row['than']}": row for row in against.to_dict("records")}
    return Findings(tables, [above_zero(*one) for one in read.items()])


def pairs_mean(matrix: np.ndarray) -> float:
    """Mean over unordered pairs."""
    return float(matrix[np.triu_indices(len(matrix), 1)].mean())


def specificity(agreed: dps.Overlap, scores: HeadScores, config: Users) -> pd.DataFrame:
    """Agreement of halves within and between users, by overlap and by rank correlation."""
    overlaps = agreed.specificity
    if overlaps is None:
        raise ValueError("halves need two examples a user; raise max_examples")
    rows = [{"measure": "jaccard", "pair": row.pop("measure"), **row} for row in overlaps.to_dict("records")]
    within, between = correlations(scores, config)
    for pair, values in (("within", within), ("between", between), ("difference", within - between)):
        rows.append({"measure": "spearman", "pair": pair, **interval(values)})
    return pd.DataFrame(rows)


def correlations(scores: HeadScores, config: Users) -> tuple[np.ndarray, np.ndarray]:
    """Rank correlation of each user's two halves, and of one half with other users' halves."""
    owned = [scores.rows(user) for user in scores.users if len(scores.rows(user)) > 1]
    half, values = min(map(len, owned)) // 2, scores.values.double().flatten(1).numpy()
    found = np.zeros((len(owned), len(owned)))
    for split in range(config.n_splits):
        rng = np.random.default_rng([config.seed, split])
        orders = [rng.permutation(rows) for rows in owned]
        sides = [
            np.stack([values[order[part]].mean(0) for order in orders]) for part in (slice(half), slice(half, 2 * half))
        ]
        ranks = np.concatenate([rankdata(side, axis=1) for side in sides])
        found += np.corrcoef(ranks)[: len(owned), len(owned) :] / config.n_splits
    within = found.diagonal()
    return within, (found.sum(1) - within) / (len(owned) - 1)


def others_heads(scores: HeadScores, users: list[User], config: Users) -> dict[str, dps.HeadSet]:
    """For each user the top heads of one other, drawn with a seed."""
    found = {}
    for user in users:
        rest = [other for other in scores.users if other != user.id]
        found[user.id] = scores.top(config.k, random.Random(f"{config.seed}|{user.id}").choice(rest))
    return found


def agreement_of_clusters(
    clusters: dps.UserClusters, users: list[User], scores: HeadScores, config: Users
) -> pd.DataFrame:
    """Do users who write alike have similar maps?"""
    by_map = dps.cluster_users(users, config.n_clusters, by="scores", scores=scores, seed=config.seed)
    observed, rng = adjusted_rand_score(clusters.labels, by_map.labels), np.random.default_rng(config.seed)
    null = [adjusted_rand_score(rng.permutation(clusters.labels), by_map.labels) for _ in range(config.n_null)]
    sizes = [", ".join(str(n) for n in np.bincount(found.labels)) for found in (clusters, by_map)]
    row = {"sizes by text": sizes[0], "sizes by maps": sizes[1], "adjusted Rand index": float(observed)}
    return pd.DataFrame([row | {"p": add_one_p(float(observed), np.array(null))}])


if __name__ == "__main__":
    main("users", __doc__ or "", Users, measure)
