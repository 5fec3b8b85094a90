"""Which finder finds heads that carry the user, at what cost elsewhere?

    python -m experiments.q15_finders [--config FILE.yaml] [--out runs/finders]

Question. Of the ways to choose K heads, which takes most of what a user's own profile brings beyond another user's, on
users and examples that did not choose the heads, and costs least where it should change nothing?

Hypotheses. (1) The best finder is worth more than zero-PCS, the profile-specific PCS by zero ablation. (2) It is worth
more than induction heads. (3) A set of at most 2%, or (4) 4%, of the heads takes at least 90% of the gain over another
user, and costs the task without a profile, and neutral text, no more than random heads of the same layers do.

Measure. The users of a corpus fall into two random halves. At most 13 users of each choose heads on their newest
discovery example, with donors among themselves, and the other half is tested with them, on its newest two evaluation
examples, heads zeroed, K = 5, 10, 20. Worth of a set for a user: gain over another user removed − neutral cost − half
of the task cost, nats per token; of a finder: the mean over the three K. Beside it: necessity and sufficiency by
patches, CPR and CMD of rankings, overlap of the two halves' sets, processor time. Finders: zero-PCS, exact patches,
and `find_heads` by rank (integrated patches), gates, forward selection and conditional effects; each free, and with
bounds on both costs (zero-PCS and exact patches: the longest beginning of the ranking that keeps them). Users of all
corpora are one sample.

Control. Two random sets of the same layers for every user, set and K; induction and retrieval heads by their authors'
definitions.

Decision rule. The default finder is the one with the highest lower bound of worth, 95% over users; of those whose
lower bounds lie within 0.02 of it, the cheapest, in the order of CHEAP_FIRST below. (1) and (2) are supported if the
interval of the paired difference of worth lies above 0, not supported if it lies below, else undecided. (3), (4) are
supported if for one finder the interval of the share of the gain removed lies above 0.9 and neither difference of
costs to random sets has an interval above 0; not supported if for every finder the share's interval lies below 0.9 or
a difference of costs lies above 0; else undecided. Four hypotheses, each reported; no further correction.

What was measured of half a corpus is kept in three tables in `measured/CORPUS/half0` or `half1` of the run folder,
users by number; what has its tables in the folder `measured` of the config is read from there.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

import dps_lens as dps
from dps_lens.data import User
from dps_lens.files import write_text
from dps_lens.finding import Bounds
from dps_lens.selection import HeadSource
from dps_lens.stats.intervals import columns, interval, ratio_interval
from dps_lens.validation.faithfulness import SIZES
from experiments.lib.choosing import BOUNDED, EXACT, ZERO, Half
from experiments.lib.halves import halves
from experiments.lib.harness import Claim, Config, Findings, Lab, Outcome, decide, main

CHEAP_FIRST = tuple(
    name + label for name in ("rank", EXACT, ZERO, "gates", "conditional", "greedy") for label in ("", BOUNDED)
)
INDUCTION, FULL, TIE = "induction", "full model", 0.02
CORPORA = {
    "govblog": "govblog/lamp4_questions.json",
    "openblog": "openblog/lamp4_questions.json",
    "acl": "acl/longlamp_abstract.jsonl",
}
COPIED = ("gain_removed_other", "gain_removed", "gain_other", "gain")
BESIDE = ("gain_removed_other", "neutral_cost", "task_cost")
COLUMNS = (
    "gain_other",
    "gain",
    "gain_removed_other",
    "gain_removed",
    "task_cost",
    "neutral_cost",
    "necessity_other",
    "sufficiency_other",
    *(f"copied {name}" for name in COPIED),
    *(f"random {name}" for name in BESIDE),
)
SHARES = (0.02, 0.04)
TABLES = ("by_user", "circuits", "sets")

Users: TypeAlias = Float[np.ndarray, " user"]


class Finders(Config):
    corpora: dict[str, str] = CORPORA
    max_examples: int = 1
    held_out: int = 2
    most_choosing: int = 13
    ks: tuple[int, ...] = (5, 10, 20)
    more_ks: tuple[int, ...] = ()
    max_task_cost: float = 0.2
    max_neutral_cost: float = 0.05
    kinds: tuple[str, ...] = ("induction", "retrieval")
    n_random: int = 2
    measured: Path | None = None


class Corpus:
    """What the finders of one corpus chose, half by half, and what that does to the other half."""

    def __init__(self, name: str, config: Finders, lab: Lab) -> None:
        self.name, self.config, self.lab = name, config, lab
        self.out = lab.out / "measured" / name
        self.users: list[User] = [user for user in lab.users(config.corpora[name]) if user.examples]
        self.ks = tuple(sorted({*config.ks, *config.more_ks}))

    def tables(self) -> dict[str, pd.DataFrame]:
        """Kept tables of both halves, or those that are measured now."""
        one, two = halves(len(self.users), 1, self.config.seed)[0]
        made = [self._kept(number, *split) for number, split in enumerate(((one, two), (two, one)))]
        return {name: pd.concat([tables[name] for tables in made], ignore_index=True) for name in TABLES}

    def _kept(self, number: int, choosing: Sequence[int], tested: Sequence[int]) -> dict[str, pd.DataFrame]:
        folders = [folder / self.name for folder in (self.config.measured,) if folder] + [self.out]
        for folder in (folder / f"half{number}" for folder in folders):
            if all((folder / f"{name}.csv").is_file() for name in TABLES):
                return {name: pd.read_csv(folder / f"{name}.csv") for name in TABLES}
        for name, frame in self._half(number, choosing, tested).items():
            write_text(self.out / f"half{number}" / f"{name}.csv", frame.to_csv(index=False, float_format="%.5g"))
        return self._kept(number, choosing, tested)

    def _half(self, number: int, choosing: Sequence[int], tested: Sequence[int]) -> dict[str, pd.DataFrame]:
        config = self.config
        half = Half(
            self.lab.model,
            [self.users[user] for user in choosing[: config.most_choosing]],
            self.ks,
            Bounds(config.max_task_cost, config.max_neutral_cost),
            config.prompt,
            config.max_examples,
            config.seed,
            self.out / f"half{number}",
        )
        users = [self.users[user] for user in tested]
        sets = half.sets | {name: {k: scores.top(k) for k in self.ks} for name, scores in self.references.items()}
        shared: dict[str, Any] = {
            "max_examples": config.held_out,
            "prompt_config": config.prompt.config(),
            "seed": config.seed,
        }
        # Bounds leave some sets short: a family is one finder at one K, whole whatever it holds.
        families: dict[str, HeadSource] = {
            f"{name}|{k}": half.as_found(heads) for name, of in sets.items() for k, heads in of.items()
        }
        effects = dps.ablation_curve(
            self.lab.model,
            users,
            families,
            ks=(max(self.ks),),
            ablation="zero",
            n_random=config.n_random,
            held_out_config=dps.HeldOutConfig(controls=("own", "no_profile", "other_user", "neutral")),
            out=half.out / "effects",
            **shared,
        )
        n_heads = self.lab.model.cfg.n_layers * self.lab.model.cfg.n_heads
        rankings = half.rankings | {name: scores.top(n_heads) for name, scores in self.references.items()}
        curves = dps.faithfulness(self.lab.model, users, rankings, n_random=2, out=half.out / "faithfulness", **shared)
        return {
            "by_user": rows_of(effects, tested),
            "circuits": circuits_of(curves, tested),
            "sets": pd.DataFrame(
                {"half": number, "family": name, "K": k, "heads": str(heads), "seconds": half.spent(name)}
                for name, of in sets.items()
                for k, heads in of.items()
            ),
        }

    @cached_property
    def references(self) -> dict[str, dps.HeadScores]:
        return self.lab.references(self.config.kinds)


def rows_of(effects: dps.SetEffects, users: Sequence[int]) -> pd.DataFrame:
    """One row a user and set, and one of the unedited model; `copied` columns are the part of copied tokens."""
    every, copied = effects.by_user(), effects.by_user(part="copied")
    for measure in COPIED:
        every[f"copied {measure}"] = copied[measure]
    numbers = dict(zip(dict.fromkeys(effects.user_ids), users, strict=True))
    names = every["family"].str.partition("|")
    every["user"] = every["user"].map(numbers)
    every["family"], every["K"] = names[0], pd.to_numeric(names[2]).fillna(0).astype(int)
    return every[["user", "family", "K", *(name for name in COLUMNS if name in every)]]


def circuits_of(curves: dps.Faithfulness, users: Sequence[int]) -> pd.DataFrame:
    """One row a user and ranking: NLL with all heads patched but those of each size, with all of them, with none."""
    numbers = dict(zip(dict.fromkeys(curves.user_ids), users, strict=True))
    owners = [numbers[user] for user in curves.user_ids]
    draws = {f"random {draw}": curves.random[:, draw] for draw in range(curves.n_random)}
    frames = []
    for family, losses in {**dict(zip(curves.families, curves.circuits.unbind(1), strict=True)), **draws}.items():
        frame = pd.DataFrame(losses.numpy(), columns=[f"{size:g}" for size in curves.sizes])
        frame = frame.assign(full=curves.full.numpy(), empty=curves.empty.numpy(), user=owners)
        frames.append(frame.groupby("user", as_index=False).mean().assign(family=family))
    return pd.concat(frames)


def measure(config: Finders, lab: Lab) -> Findings:
    read = {name: Corpus(name, config, lab).tables() for name in config.corpora}
    tables = {
        name: pd.concat([of[name].assign(corpus=corpus) for corpus, of in read.items()], ignore_index=True)
        for name in TABLES
    }
    by_user, n_heads = tables["by_user"], lab.model.cfg.n_layers * lab.model.cfg.n_heads
    worths = {family: worth(by_user, family, config.ks) for family in families_of(by_user)}
    table = pd.DataFrame([{"family": family, **interval(of, 0.95)} for family, of in worths.items()])
    finders = [family for family in worths if family not in config.kinds]
    best = chosen(table, finders)
    differences = pd.DataFrame(
        {"family": family, "than": than, **interval(worths[family] - worths[than], 0.95)}
        for family in worths
        for than in (ZERO, INDUCTION)
        if than in worths and family != than
    )
    moon = shares(by_user)
    claims = [better(best, than, differences) for than in (ZERO, INDUCTION) if than in worths]
    claims += [moonshot(moon[moon["K"] <= share * n_heads], share) for share in SHARES]
    found = {
        "worth": table.assign(default=table["family"] == best),
        "differences": differences,
        "shares": moon,
        "effects": effects_of(by_user),
        "faithfulness": areas(tables["circuits"]),
        "overlaps": overlaps(tables["sets"]),
        "one corpus": pd.concat(
            pd.DataFrame(
                {"corpus": corpus, "family": family, **interval(worth(of, family, config.ks), 0.95)}
                for family in families_of(of)
            )
            for corpus, of in by_user.groupby("corpus", sort=False)
        ),
    }
    return Findings(found, claims, {"processor": tables["sets"].groupby("family", as_index=False)["seconds"].sum()})


def families_of(by_user: pd.DataFrame) -> list[str]:
    return [family for family in by_user["family"].unique() if family != FULL]


def of_users(by_user: pd.DataFrame, family: str, k: int, measure: str) -> Users:
    """One value a user of all corpora, in one order."""
    rows = by_user[(by_user["family"] == family) & (by_user["K"] == k)]
    return rows.sort_values(["corpus", "user"])[measure].to_numpy()


def worth(by_user: pd.DataFrame, family: str, ks: Sequence[int]) -> Users:
    def of(k: int) -> Users:
        removed, neutral, task = (of_users(by_user, family, k, name) for name in BESIDE)
        return removed - neutral - task / 2

    return np.mean([of(k) for k in ks], axis=0)


def chosen(table: pd.DataFrame, finders: list[str]) -> str:
    lows = table.set_index("family")["low"][finders]
    return min(lows[lows >= lows.max() - TIE].index, key=CHEAP_FIRST.index)


def effects_of(by_user: pd.DataFrame) -> pd.DataFrame:
    """Every measure of every family and K over all users, and what random sets, copied tokens and the rest have of
    it."""
    rest = {f"rest {name}": by_user[name] - by_user[f"copied {name}"] for name in COPIED}
    rows = []
    for (family, k), of in by_user.assign(**rest).groupby(["family", "K"], sort=False):
        row = {"family": family, "K": k}
        for name in (name for name in (*COLUMNS, *rest) if name in of):
            row |= columns(name, interval(of[name].to_numpy(), 0.95))
        rows.append(row)
    return pd.DataFrame(rows)


def shares(by_user: pd.DataFrame) -> pd.DataFrame:
    """Share of the gain over another user that a family removes, and its costs beyond random sets."""
    gain = of_users(by_user, FULL, 0, "gain_other")
    rows = []
    for family in families_of(by_user):
        for k in sorted(by_user.loc[by_user["family"] == family, "K"].unique()):
            row = {"family": family, "K": k, **ratio_interval(of_users(by_user, family, k, BESIDE[0]), gain, 0.95)}
            for cost in BESIDE[1:]:
                beyond = of_users(by_user, family, k, cost) - of_users(by_user, family, k, f"random {cost}")
                row |= columns(cost, interval(beyond, 0.95))
            rows.append(row)
    return pd.DataFrame(rows)


def areas(circuits: pd.DataFrame) -> pd.DataFrame:
    """CPR and CMD over the users of all corpora."""
    made = {family: of.sort_values(["corpus", "user"]) for family, of in circuits.groupby("family", sort=False)}
    one = next(iter(made.values()))
    users = (one["corpus"] + " " + one["user"].astype(str)).tolist()
    losses = [torch.tensor(of[[f"{size:g}" for size in SIZES]].to_numpy(float)) for of in made.values()]
    return dps.Faithfulness(
        tuple(made),
        SIZES,
        tuple(range(len(SIZES))),
        tuple(users),
        tuple(users),
        full=torch.tensor(one["full"].to_numpy(float)),
        empty=torch.tensor(one["empty"].to_numpy(float)),
        circuits=torch.stack(losses, 1),
        random=torch.zeros(len(users), 0, len(SIZES), dtype=torch.float64),
    ).areas()


def overlaps(sets: pd.DataFrame) -> pd.DataFrame:
    """Jaccard of the sets of two halves, a mean over corpora, and how many heads a set holds."""
    rows = []
    for (family, k), of in sets.groupby(["family", "K"], sort=False):
        names = of.set_index(["corpus", "half"])["heads"].fillna("")
        heads = {key: dps.HeadSet.parse(str(one)) for key, one in names.items()}
        pairs = [heads[corpus, 0].jaccard(heads[corpus, 1]) for corpus in of["corpus"].unique()]
        size = float(np.mean([len(one) for one in heads.values()]))
        rows.append({"family": family, "K": k, "heads": size, "Jaccard": float(np.mean(pairs))})
    return pd.DataFrame(rows)


def better(best: str, than: str, differences: pd.DataFrame) -> Claim:
    hypothesis = f"the best finder ({best}) is worth more than {than}"
    rows = differences[(differences["family"] == best) & (differences["than"] == than)]
    if rows.empty:
        return Claim(hypothesis, "the interval lies above 0", {}, "not supported")
    measured = {name: float(rows.iloc[0][name]) for name in ("mean", "low", "high")}
    return Claim(hypothesis, "the interval lies above 0", measured, decide(measured["low"], measured["high"]))


def moonshot(rows: pd.DataFrame, share: float) -> Claim:
    rule = "for one finder, the share's interval lies above 0.9 and no cost lies above that of random heads"
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
