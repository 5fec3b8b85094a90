"""Do heads, or likenesses between users, carry over to another domain, another time, another model?

    python -m experiments.q08_transfer [--config FILE.yaml] [--out runs/transfer]

Question. Are the top heads of bloggers those of authors of abstracts? Are those of older documents those of newer ones?
In a second model (`second: ID or folder` in the config; by default Pythia-160M or GPT-2,
where the Hub's cache on this machine holds one), do they lie at a similar relative depth, and
does it see the same users as alike?

Hypotheses. (1) Domain: the top 10 of bloggers and of authors overlap more than random sets of the same layers.
(2) Time: so do those of the older and the newer half of the scored documents. (3) Depth: in the second model the
profile-specific PCS lies at the same relative depths. (4) Users: pairs of users with similar maps in one model have
similar maps in the other.

Measure. Jaccard overlap of the top 10 by profile-specific PCS, and rank correlation of the mean maps. Depth:
Wasserstein distance of the positive PCS over relative depth (layer / last layer). Users: rank correlation, over pairs
of users, of the correlations of their maps (representational similarity).

Control. Overlaps: random sets of the same layers. Time: the same overlap for the two interleaved halves, a ceiling.
Depth: 1,000 random permutations of the second model's layers. Users: 1,000 permutations of the users.

Decision rule. One-sided p by these controls: supported at most 0.0125 (four hypotheses), not supported above 0.05,
else undecided. Hypotheses of a model that is not there are left out.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from scipy.stats import spearmanr, wasserstein_distance

import dps_lens as dps
from dps_lens.data import User
from dps_lens.scores import HeadScores
from dps_lens.stats.intervals import add_one_p
from experiments.lib.harness import Claim, Config, Findings, Lab, Outcome, main
from experiments.q01_existence import taken

LEVEL, LOOSE = 0.0125, 0.05
SMALL = ("EleutherAI/pythia-160m", "openai-community/gpt2")


class Transfer(Config):
    other_users: str = "acl/longlamp_abstract.jsonl"
    max_other_users: int = 16
    other_examples: int = 1
    second: str | None = None
    k: int = 10
    n_null: int = 1000


def measure(config: Transfer, lab: Lab) -> Findings:
    users = lab.users()
    scores = lab.scores(users)
    others = lab.users(config.other_users, max_users=config.max_other_users)
    foreign = lab.scores(others, max_examples=config.other_examples)
    pairs = {
        "domain": (scores, foreign),
        "time": (part(scores, newer=False), part(scores, newer=True)),
        "interleaved": (taken(scores, 0), taken(scores, 1)),
    }
    overlaps = pd.DataFrame([{"compared": name, **compared(*pair, config)} for name, pair in pairs.items()])
    p = overlaps.set_index("compared")["p"]
    claims = [
        by_p("bloggers and authors share top heads", float(p["domain"])),
        by_p("older and newer documents share top heads", float(p["time"])),
    ]
    tables = {"overlap": overlaps, "depth": pd.DataFrame([{"model": Path(config.model).name, **depth_row(scores)}])}
    if second := config.second or cached(SMALL):
        found, more = across_models(users, scores, second, config, lab)
        tables["models"], tables["depth"] = found, more
        claims += [by_p(str(row["hypothesis"]), float(row["p"])) for row in found.to_dict("records")]
    return Findings(tables, claims)


def cached(names: Sequence[str], cache: Path | None = None) -> str | None:
    """The first of these models that the Hub's cache on this machine holds."""
    for name in names:
        files = [try_to_load_from_cache(name, file, cache_dir=cache) for file in ("config.json", "model.safetensors")]
        if all(isinstance(file, str) for file in files):
            return name
    return None


def part(scores: HeadScores, *, newer: bool) -> HeadScores:
    """The older or the newer half of each user's documents; a user's middle one is in neither."""
    rows = []
    for user in scores.users:
        own = scores.rows(user)
        half = len(own) // 2
        rows += own[len(own) - half :] if newer else own[:half]
    return scores.take(rows)


def compared(one: HeadScores, two: HeadScores, config: Transfer) -> dict[str, float]:
    found = dps.overlap({"one": one, "two": two}, k=config.k, n_null=config.n_null, seed=config.seed)
    row = found.to_frame().iloc[0]
    counts = {"users": len({*one.users, *two.users}), "examples": len(one.values) + len(two.values)}
    named = {"jaccard": "jaccard", "random sets": "null_mean", "p": "p", "rank correlation": "spearman"}
    return counts | {name: float(row[column]) for name, column in named.items()}


def by_layer(scores: HeadScores) -> Float[np.ndarray, " layer"]:
    """Share of the positive PCS in each layer."""
    positive = scores.mean().clamp(min=0).sum(1).numpy()
    return positive / max(positive.sum(), 1e-12)


def depths(n_layers: int) -> Float[np.ndarray, " layer"]:
    return np.arange(n_layers) / max(n_layers - 1, 1)


def depth_row(scores: HeadScores) -> dict[str, float]:
    """Where the positive PCS lies: mean relative depth, and shares of thirds of the layers."""
    shares = by_layer(scores)
    thirds = [float(part.sum()) for part in np.array_split(shares, 3)]
    mean = float(shares @ depths(len(shares)))
    return {"mean depth": mean, **dict(zip(("lower third", "middle third", "upper third"), thirds, strict=True))}


def across_models(
    users: list[User], scores: HeadScores, name: str, config: Transfer, lab: Lab
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Relative depth, and the likeness of users, in two models."""
    other = Lab(config.model_copy(update={"model": name}), Path(lab.out))
    second, rng = other.scores(users), np.random.default_rng(config.seed)
    one, two = by_layer(scores), by_layer(second)
    at = depths(len(one)), depths(len(two))
    distance = wasserstein_distance(*at, one, two)
    null = np.array([wasserstein_distance(*at, one, rng.permutation(two)) for _ in range(config.n_null)])
    maps = [found.samples().flatten(1).numpy() for found in (scores, second)]
    alike = similarity(*maps)
    n = len(maps[0])
    permuted = np.array([similarity(maps[0], maps[1][rng.permutation(n)]) for _ in range(config.n_null)])
    rows = [
        {
            "hypothesis": "the same relative depth",
            "measured": distance,
            "null": null.mean(),
            "p": add_one_p(-distance, -null),
        },
        {
            "hypothesis": "the same users are alike",
            "measured": alike,
            "null": permuted.mean(),
            "p": add_one_p(alike, permuted),
        },
    ]
    measured = ((config.model, scores), (name, second))
    return pd.DataFrame(rows), pd.DataFrame([{"model": Path(of).name, **depth_row(found)} for of, found in measured])


def similarity(one: Float[np.ndarray, "user head"], two: Float[np.ndarray, "user other"]) -> float:
    """Rank correlation over pairs of users of the correlations of their maps."""
    pairs = np.triu_indices(len(one), 1)
    return float(np.asarray(spearmanr(*(np.corrcoef(maps)[pairs] for maps in (one, two))).statistic))


def by_p(hypothesis: str, p: float) -> Claim:
    outcome: Outcome = "supported" if p <= LEVEL else "not supported" if p > LOOSE else "undecided"
    return Claim(hypothesis, f"p at most {LEVEL}; not supported above {LOOSE}", {"p": p}, outcome)


if __name__ == "__main__":
    main("transfer", __doc__ or "", Transfer, measure)
