"""Which finder finds heads that carry the user, at what cost elsewhere?

    python -m experiments.q15_finders [--config FILE.yaml] [--out runs/finders]

Question. Of the ways to choose K heads, which takes most of what a user's own profile brings beyond another user's, on
users and examples that did not choose the heads, and costs least where it should change nothing?

Hypotheses. (1) The best finder is worth more than zero-PCS, the profile-specific PCS by zero ablation. (2) It is worth
more than induction heads. (3) A set of at most 2%, or (4) 4%, of the heads takes at least 90% of the gain over another
user, and costs the task without a profile, and neutral text, no more than random heads of the same layers do.

Measure. Heads are chosen on each user's newest discovery examples, by users in other folds than the user who is tested,
and zeroed on the newest evaluation examples, K = 5, 10, 20. Worth of a set for a user: gain over another user removed −
neutral cost − half of the task cost, nats per token; of a finder: the mean over the three K. Beside it: necessity and
sufficiency by patches, CPR and CMD of rankings, overlap of the sets of two folds, time. Finders: zero-PCS, exact
patches, integrated patches; `find_heads` by rank, gates, conditional effects and forward selection, each without and
with bounds on both costs. Users of all corpora are one sample.

Control. Random sets of the same layers for every family and K; induction and retrieval heads by their authors'
definitions.

Decision rule. The default finder is the one with the highest lower bound of worth, 95% over users; of those whose lower
bounds lie within 0.02 of it, the one that takes least time. (1) and (2) are supported if the interval of the paired
difference of worth lies above 0, not supported if it lies below, else undecided. (3), (4) are supported if for one
finder the interval of the share of the gain removed lies above 0.9 and neither difference of costs to random sets has
an interval above 0; not supported if for every finder the share's interval lies below 0.9 or a difference of
costs lies above 0; else undecided. Four hypotheses, each reported; no further correction.
"""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import pandas as pd

import dps_lens as dps
from dps_lens.data import User
from dps_lens.files import write_json
from dps_lens.literals import FindMethod
from dps_lens.selection import HeadSource, folds
from dps_lens.stats.intervals import interval, ratio_interval, user_means
from experiments.lib.harness import Claim, Config, Findings, Lab, Outcome, decide, main
from experiments.lib.held_out import by_user, copying, shown

T = TypeVar("T")
ZERO, INDUCTION, TIE = "zero-PCS", "induction", 0.02
NESTED = ("greedy", "conditional")
CORPORA = {
    "govblog": "govblog/lamp4_questions.json",
    "openblog": "openblog/lamp4_questions.json",
    "acl": "acl/longlamp_abstract.jsonl",
}
SHOWN = ("gain_removed_other", "gain_removed", "task_cost", "neutral_cost", "necessity_other", "sufficiency_other")


class Finders(Config):
    corpora: dict[str, str] = CORPORA
    max_examples: int = 2
    held_out: int = 2
    ks: tuple[int, ...] = (5, 10, 20)
    methods: tuple[FindMethod, ...] = ("rank", "gates", "conditional", "greedy")
    max_task_cost: float = 0.2
    max_neutral_cost: float = 0.05
    n_bootstraps: int = 0
    kinds: tuple[str, ...] = ("induction", "retrieval")
    n_random: int = 20


class Corpus:
    """The finders of one corpus, and what their sets do on its held-out examples.

    Attributes:
        seconds: of processor time, by finder, as it was first made.
    """

    def __init__(self, name: str, config: Finders, lab: Lab) -> None:
        self.name, self.config, self.lab = name, config, lab
        self.users: list[User] = [user for user in lab.users(config.corpora[name]) if user.examples]
        self.seconds: dict[str, float] = {}
        self.scores = self._scores()
        self.found = {name: of for name, of in self._found()}
        self.effects = {k: self._effects(k) for k in config.ks}

    def _timed(self, name: str, make: Callable[[], T]) -> T:
        kept = self.lab.out / self.name / "seconds" / f"{name.replace(' ', '_')}.json"
        begun = time.process_time()
        made = make()
        if not kept.is_file():
            write_json(kept, time.process_time() - begun)
        self.seconds[name] = json.loads(kept.read_text(encoding="utf-8"))
        return made

    def _scores(self) -> dict[str, dps.HeadScores]:
        patch: dict[str, Any] = {"ablation": "patch", "against": "other_user"}
        donors = dps.ScoreConfig(n_donors=1)
        asked: dict[str, dict[str, Any]] = {
            ZERO: {"ablation": "zero", "against": "no_profile", "method": "exact"},
            "exact patch": {**patch, "method": "exact"},
            "integrated": {**patch, "method": "integrated"},
        }
        shared: dict[str, Any] = {
            "max_examples": self.config.max_examples,
            "prompt_config": self.config.prompt.config(),
        }

        def score(name: str) -> dps.HeadScores:
            out = self.lab.out / self.name / "scores" / name.replace(" ", "_")
            return dps.score_heads(
                self.lab.model, self.users, **asked[name], **shared, score_config=donors, seed=self.config.seed, out=out
            )

        return {name: self._timed(name, partial(score, name)) for name in asked} | self.lab.references(
            self.config.kinds
        )

    def _found(self) -> list[tuple[str, dict[int, dps.FoundHeads]]]:
        made = []
        for method in self.config.methods:
            for bounded in (False, True):
                name = f"{method}, bounded" if bounded else method
                # The beginnings of these sets are the sets of smaller k, and keep the bounds.
                nested = method in NESTED or (method == "rank" and not bounded)
                ks = (max(self.config.ks),) if nested else self.config.ks
                make = partial(self._find, method, bounded)
                sets = {k: self._timed(f"{name}, {k}", partial(make, k)) for k in ks}
                made.append((name, {k: sets[k if k in sets else max(ks)] for k in self.config.ks}))
        return made

    def _find(self, method: FindMethod, bounded: bool, k: int) -> dps.FoundHeads:
        config = self.config
        bounds: dict[str, Any] = {}
        if bounded:
            bounds = {"max_task_cost": config.max_task_cost, "max_neutral_cost": config.max_neutral_cost}
        return dps.find_heads(
            self.lab.model,
            self.users,
            k,
            method=method,
            max_examples=config.max_examples,
            prompt_config=config.prompt.config(),
            find_config=dps.FindConfig(n_donors=1, n_bootstraps=config.n_bootstraps),
            seed=config.seed,
            out=self.lab.out / self.name / "found" / f"{method}-{k}{'-bounded' if bounded else ''}",
            **bounds,
        )

    def families(self, k: int) -> dict[str, HeadSource]:
        return {**self.scores, **{name: sets[k] for name, sets in self.found.items()}}

    def _effects(self, k: int) -> dps.SetEffects:
        return dps.ablation_curve(
            self.lab.model,
            self.users,
            self.families(k),
            ks=(k,),
            ablation="zero",
            n_random=self.config.n_random,
            max_examples=self.config.held_out,
            prompt_config=self.config.prompt.config(),
            seed=self.config.seed,
            out=self.lab.out / self.name / f"effects-{k}",
        )

    def faithfulness(self) -> pd.DataFrame:
        curves = dps.faithfulness(
            self.lab.model,
            self.users,
            self.scores,
            max_examples=self.config.held_out,
            prompt_config=self.config.prompt.config(),
            seed=self.config.seed,
            out=self.lab.out / self.name / "faithfulness",
        )
        return curves.areas().assign(corpus=self.name)

    def overlaps(self) -> pd.DataFrame:
        rows = []
        for k, effects in self.effects.items():
            for family in effects.families:
                sets = effects.sets(family, k)
                of_fold = [sets[fold[0]] for fold in folds(self.users, self.config.seed)]
                pairs = [a.jaccard(b) for a, b in combinations(of_fold, 2)]
                rows.append(
                    {"corpus": self.name, "family": family, "K": k, "Jaccard of folds": np.mean(pairs or [1.0])}
                )
        return pd.DataFrame(rows)


def measure(config: Finders, lab: Lab) -> Findings:
    corpora = [Corpus(name, config, lab) for name in config.corpora]
    worths = {family: worth(corpora, family, config) for family in corpora[0].families(config.ks[0])}
    table = pd.DataFrame([{"family": family, **interval(of, 0.95)} for family, of in worths.items()])
    seconds = {family: sum(spent(corpus, family) for corpus in corpora) for family in worths}
    finders = [family for family in worths if family not in config.kinds]
    best = chosen(table, seconds, finders)
    differences = pd.DataFrame(
        {"family": family, "than": than, **interval(worths[family] - worths[than], 0.95)}
        for family in finders
        for than in (ZERO, INDUCTION)
        if than in worths and family != than
    )
    moon = pd.DataFrame([row for k in config.ks for row in shares(corpora, k, lab)])
    n_heads = corpora[0].scores[ZERO].values[0].numel()
    claims = [
        better(best, than, differences, number)
        for number, than in (("best", ZERO), ("best", INDUCTION))
        if than in worths
    ]
    claims += [moonshot(moon, share, [k for k in config.ks if k <= share * n_heads]) for share in (0.02, 0.04)]
    tables = {
        "worth": table.assign(default=table["family"] == best),
        "differences": differences,
        "shares": moon,
        "effects": tagged(corpora, shown_rows),
        "copied and rest": tagged(corpora, copying),
        "faithfulness": pd.concat([corpus.faithfulness() for corpus in corpora]),
        "overlaps": pd.concat([corpus.overlaps() for corpus in corpora]),
    }
    times = pd.DataFrame([{"corpus": c.name, "finder": name, "s": s} for c in corpora for name, s in c.seconds.items()])
    return Findings(tables, claims, {"processor": times})


def worth(corpora: list[Corpus], family: str, config: Finders) -> np.ndarray:
    """Of a family, one value a user of all corpora."""

    def of(corpus: Corpus, k: int) -> np.ndarray:
        effects = corpus.effects[k]
        removed, neutral, task = (
            by_user(effects, family, k, name) for name in ("gain_removed_other", "neutral_cost", "task_cost")
        )
        return removed - neutral - task / 2

    return np.concatenate([np.mean([of(corpus, k) for k in config.ks], axis=0) for corpus in corpora])


def spent(corpus: Corpus, family: str) -> float:
    """Processor time of all K of a finder."""
    return sum(s for name, s in corpus.seconds.items() if name == family or name.startswith(f"{family}, "))


def chosen(table: pd.DataFrame, seconds: Mapping[str, float], finders: list[str]) -> str:
    lows = table.set_index("family")["low"][finders]
    return min(lows[lows >= lows.max() - TIE].index, key=lambda family: seconds[family])


def tagged(corpora: list[Corpus], rows: Callable[[dps.SetEffects], pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([rows(of).assign(corpus=corpus.name) for corpus in corpora for of in corpus.effects.values()])


def shown_rows(effects: dps.SetEffects) -> pd.DataFrame:
    return shown(effects, SHOWN)


def shares(corpora: list[Corpus], k: int, lab: Lab) -> list[dict[str, Any]]:
    """Share of the gain over another user that a family removes, and its costs beyond random sets, over all users."""
    rows = []
    for family in corpora[0].effects[k].families:
        of = [corpus.effects[k] for corpus in corpora]
        removed = np.concatenate([by_user(effects, family, k, "gain_removed_other") for effects in of])
        gain = np.concatenate([gains(effects) for effects in of])
        row: dict[str, Any] = {"family": family, "K": k, **ratio_interval(removed, gain, 0.95)}
        for cost in ("task_cost", "neutral_cost"):
            beyond = interval(np.concatenate([beyond_random(effects, family, k, cost) for effects in of]), 0.95)
            row |= {cost: beyond["mean"], f"{cost}_low": beyond["low"], f"{cost}_high": beyond["high"]}
        rows.append(row)
    return rows


def gains(effects: dps.SetEffects) -> np.ndarray:
    return user_means(effects.full["other_user"][:, 0] - effects.full["own"][:, 0], effects.user_ids)


def beyond_random(effects: dps.SetEffects, family: str, k: int, cost: str) -> np.ndarray:
    """A cost beyond the mean of the random sets, a value a user."""
    condition = {"task_cost": "no_profile", "neutral_cost": "neutral"}[cost]
    at = (slice(None), slice(None), effects.families.index(family), effects.ks.index(k), 0)
    return by_user(effects, family, k, cost) - effects.draws[condition][at].mean(0).numpy()


def better(best: str, than: str, differences: pd.DataFrame, number: str) -> Claim:
    hypothesis = f"the {number} finder ({best}) is worth more than {than}"
    rows = differences[(differences["family"] == best) & (differences["than"] == than)]
    if rows.empty:
        return Claim(hypothesis, "the interval lies above 0", {}, "not supported")
    measured = {name: float(rows.iloc[0][name]) for name in ("mean", "low", "high")}
    return Claim(hypothesis, "the interval lies above 0", measured, decide(measured["low"], measured["high"]))


def moonshot(moon: pd.DataFrame, share: float, ks: list[int]) -> Claim:
    rule = "for one finder, the share's interval lies above 0.9 and no cost lies above that of random heads"
    rows = moon[moon["K"].isin(ks)]
    costly = (rows["task_cost_low"] > 0) | (rows["neutral_cost_low"] > 0)
    outcome: Outcome = "undecided"
    if ((rows["low"] >= 0.9) & ~costly).any():
        outcome = "supported"
    elif ((rows["high"] < 0.9) | costly).all():
        outcome = "not supported"
    measured = {"largest share": float(rows["mean"].max()) if len(rows) else float("nan")}
    hypothesis = (
        f"at most {share:.0%} of the heads take 90% of the gain over another user and cost no more than random ones"
    )
    return Claim(hypothesis, rule, measured, outcome)


if __name__ == "__main__":
    main("finders", __doc__ or "", Finders, measure)
