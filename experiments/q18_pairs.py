"""Do pairs of answers find other heads than the users' own texts alone, and cheaper ones?

    python -m experiments.q18_pairs [--config FILE.yaml] [--out runs/pairs]

Question. A pair, the user's own text against another user's text to the most similar task, cancels what any text
needs. Does the own profile decide such pairs, and are the heads that they find others than those that the NLL finds?

Hypotheses. (1) With the own profile the model prefers the own text by a larger margin than with another user's. (2) The
heads found by pairs remove more of the pairs' gain over another user than those found by NLL. (3) They cost the same
task without a profile less. (4) The two sets share more heads than two random sets.

Measure. Newest evaluation example of each user: `rank_answers`, per token. K heads are found on the newest discovery
example (`find_heads`, "rank", without bounds, so that costs are free to differ), once by each objective, each user
tested with heads that others chose, as many of each; both sets are measured by pairs and NLL (`ablation_curve`). Pairs
are `make_pairs`; of the probe users also of the same topic (pairs of styles) and of the same style (pairs of
topics). Users of the development corpora are one sample; the probe users, who are written for this, stand apart.

Control. The same heads' random sets of the same layers; another user's profile; sets of as many random heads for the
overlap.

Decision rule. By intervals over users at 1 − 0.05 / 4 of (1) margin with the own − with another's profile, (2) the
pairs' gain over another user that is removed, by pairs − by NLL, (3) task cost in NLL, by NLL − by pairs: supported
above 0, not supported below or at 0, else undecided. (4) supported if in the
development corpora together fewer than 1.25% of 10,000 draws of two random sets of K of all heads, one pair of sets a
corpus, have as large a mean Jaccard overlap.
"""

from typing import Any

import numpy as np
import pandas as pd

import dps_lens as dps
from dps_lens.stats.intervals import columns, interval
from experiments.lib.harness import Claim, Config, Findings, Lab, above_zero, main

CORPORA = {"govblog": "govblog/lamp4_questions.json", "acl": "acl/longlamp_abstract.jsonl"}
BESIDE: dict[str, str | None] = {"probe": None, "probe, styles": "topic", "probe, topics": "style"}
LEVEL = 1 - 0.05 / 4
DRAWS = 10_000
OBJECTIVES = ("nll", "pair")
SHOWN = ("gain_removed_other", "task_cost", "neutral_cost", "necessity_other", "sufficiency_other")


class Pairs(Config):
    corpora: dict[str, str] = CORPORA
    beside: dict[str, str | None] = BESIDE
    max_examples: int = 1
    held_out: int = 1
    k: int = 10
    n_random: int = 10


class Corpus:
    """The pairs of some users, the heads that both objectives find on them, and what these do."""

    def __init__(self, name: str, users: list[dps.User], config: Pairs, lab: Lab, same: str | None = None) -> None:
        self.name, self.users = name, dps.make_pairs(users, same=same)
        out, prompt = lab.out / name.replace(", ", "_"), config.prompt.config()
        ranks = dps.rank_answers(
            lab.model, self.users, max_examples=config.held_out, prompt_config=prompt, seed=config.seed,
            out=out / "answers",
        )  # fmt: skip
        self.answers = ranks.to_frame(level=LEVEL)
        margins = ranks.by_user("margin")
        self.widened = (margins["own"] - margins["other_user"]).to_numpy()
        self.found = {
            objective: dps.find_heads(
                lab.model,
                self.users,
                config.k,
                method="rank",
                max_task_cost=None,
                max_neutral_cost=None,
                max_examples=config.max_examples,
                prompt_config=prompt,
                find_config=dps.FindConfig(objective=objective, n_bootstraps=0),
                seed=config.seed,
                out=out / f"found-{objective}",
            )
            for objective in OBJECTIVES
        }
        crossed = {name: {user.id: found.of_user(user.id) for user in self.users} for name, found in self.found.items()}
        k = min(len(heads) for of_users in crossed.values() for heads in of_users.values())
        # Sets have no objective of their own, so that one run measures both by either.
        self.by_user = {
            objective: dps.ablation_curve(
                lab.model,
                self.users,
                {f"by {one}": heads for one, heads in crossed.items()},
                ks=(k,),
                n_random=config.n_random,
                max_examples=config.held_out,
                prompt_config=prompt,
                held_out_config=dps.HeldOutConfig(objective=objective),
                seed=config.seed,
                out=out / f"effects-{objective}",
            ).by_user()
            for objective in OBJECTIVES
        }

    def overlap(self) -> float:
        nll, pair = (self.found[objective].heads for objective in OBJECTIVES)
        return len(nll & pair) / len(nll | pair)

    def of(self, family: str, objective: str, measure: str) -> np.ndarray:
        """A measure of every user."""
        frame = self.by_user[objective]
        return frame[frame["family"] == family].set_index("user")[measure].to_numpy()


def measure(config: Pairs, lab: Lab) -> Findings:
    corpora = [Corpus(name, _tested(lab.users(source)), config, lab) for name, source in config.corpora.items()]
    probe = _tested(lab.users("probe")) if config.beside else []
    beside = [Corpus(name, probe, config, lab, same) for name, same in config.beside.items()]
    asked = pd.concat(one.answers.assign(corpus=one.name) for one in (*corpora, *beside))
    effects, found = [], []
    for one in (*corpora, *beside):
        for family in ("by nll", "by pair"):
            for objective in OBJECTIVES:
                row: dict[str, Any] = {"corpus": one.name, "heads": family, "measured by": objective}
                for name in SHOWN:
                    row |= columns(name, interval(one.of(family, objective, name), 0.95))
                    row[f"random {name}"] = float(one.of(family, objective, f"random {name}").mean())
                effects.append(row)
        sets = {f"heads by {objective}": str(one.found[objective].heads) for objective in OBJECTIVES}
        found.append({"corpus": one.name, "Jaccard": one.overlap(), **sets})

    def pooled(values: list[np.ndarray]) -> dict[str, float]:
        return interval(np.concatenate(values), LEVEL)

    def gap(measure: str, objective: str) -> list[np.ndarray]:
        return [one.of("by pair", objective, measure) - one.of("by nll", objective, measure) for one in corpora]

    n_heads = lab.model.cfg.n_layers * lab.model.cfg.n_heads
    overlap = float(np.mean([one.overlap() for one in corpora]))
    null = _random_overlaps(
        [[len(one.found[name].heads) for name in OBJECTIVES] for one in corpora], n_heads, config.seed
    )
    p = float((1 + (null >= overlap).sum()) / (1 + len(null)))
    claims = [
        above_zero("the own profile widens the margin over another user's", pooled([one.widened for one in corpora])),
        above_zero(
            "heads found by pairs remove more of the pairs' gain over another user",
            pooled(gap("gain_removed_other", "pair")),
        ),
        above_zero("heads found by pairs cost the task less", pooled([-values for values in gap("task_cost", "nll")])),
        Claim(
            "the two sets share more heads than random sets",
            f"p < {0.05 / 4:.4f} of the mean Jaccard overlap",
            {"overlap": overlap, "random": float(null.mean()), "p": p},
            "supported" if p < 0.05 / 4 else "undecided",
        ),
    ]
    return Findings({"answers": asked, "effects": pd.DataFrame(effects), "sets": pd.DataFrame(found)}, claims)


def _tested(users: list[dps.User]) -> list[dps.User]:
    return [user for user in users if user.examples]


def _random_overlaps(sizes: list[list[int]], n_heads: int, seed: int) -> np.ndarray:
    """Mean Jaccard overlaps of as many pairs of random sets."""
    rng, found = np.random.default_rng(seed), np.zeros(DRAWS)
    for one, other in sizes:
        shared = rng.hypergeometric(one, n_heads - one, other, size=DRAWS)
        found += shared / (one + other - shared) / len(sizes)
    return found


if __name__ == "__main__":
    main("pairs", __doc__ or "", Pairs, measure)
