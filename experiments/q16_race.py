"""Does anything that is added to the model, or contrasted with it, make it write more as the user would?

    python -m experiments.q16_race [--config FILE.yaml] [--out runs/race]

Question. With the user's profile in the prompt, which way of steering makes the user's own text likelier at equal KL,
and is what it does the user's?

Hypotheses. (1) Head vectors, the differences of means at the heads that `find_heads` finds, make the users' own texts
likelier. (2) They do so more than another user's vectors of the same heads. (3) More than StyleVector, one vector of
the residual stream. (4) DPS whose masked heads take their z from the run without the profile makes the own texts
likelier than DPS that zeroes them. (5) It makes them likelier at all.

Measure. Newest evaluation examples of each user, teacher-forced: change of the NLL at strengths 0.03 to 4, at the
strength of each corpus where the mean KL(steered ‖ full) is 0.05 nats a token (also 0.02, 0.1 and 0.3). Heads are found
on older examples, by users of other folds for rules of heads; the heads of vectors are one set for all users, and the
vectors are of each user's 4 newest older examples. Users of all corpora are one sample. Beside it: texts written
greedily at the strength of KL 0.1, whose author a classifier names, their fluency, what they copy from the profile,
and what they repeat.

Control. Another user's vector; random heads of the same layers at the same KL; greedy decoding is strength 0.

Decision rule. At KL 0.05, by intervals over users at 99% (five hypotheses) of (1), (5) the fall of the NLL, (2), (3),
(4) the paired difference of that fall: supported above 0, not supported below or at 0, else undecided (also where a
method does not reach this KL). Every other method is reported beside, without a claim.
"""

from collections.abc import Mapping
from functools import cached_property, reduce
from typing import Any, Literal

import numpy as np
import pandas as pd

import dps_lens as dps
from dps_lens.data import User
from dps_lens.data.conditions import DONORS, donors_of
from dps_lens.data.examples import newest
from dps_lens.errors import SteeringError
from dps_lens.heads import HeadSet
from dps_lens.intervene import Uniform
from dps_lens.stats.intervals import interval
from experiments.lib.harness import Config, Findings, Lab, above_zero, main

VECTOR, STYLE = "head_vector", "stylevector"
DPS, PATCH = "dps", "dps-patch"
LEVEL = 1 - 0.05 / 5
CORPORA = {
    "govblog": "govblog/lamp4_questions.json",
    "openblog": "openblog/lamp4_questions.json",
    "acl": "acl/longlamp_abstract.jsonl",
    "probe": "probe",
}
WRITTEN = ("style", "author", "NLL", "copied", "repeated")


class Race(Config):
    corpora: dict[str, str] = CORPORA
    max_examples: int = 2
    k: int = 10
    finder: Literal["gates", "rank", "greedy"] = "gates"
    max_task_cost: float | None = 0.2
    max_neutral_cost: float | None = 0.05
    kinds: tuple[str, ...] = ("induction", "retrieval")
    strengths: tuple[float, ...] = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    kls: tuple[float, ...] = (0.02, 0.05, 0.1, 0.3)
    decided_at: float = 0.05
    written_at: float = 0.1
    vector_examples: int = 4
    held_out: int = 2
    n_random: int = 2
    new_tokens: int = 24


class Corpus:
    """One corpus: what steers its users, and what that does to their own texts."""

    def __init__(self, name: str, config: Race, lab: Lab) -> None:
        self.name, self.config, self.lab, self.out = name, config, lab, lab.out / name
        self.users: list[User] = [user for user in lab.users(config.corpora[name]) if user.examples]
        self.found = dps.find_heads(
            lab.model,
            self.users,
            config.k,
            method=config.finder,
            max_task_cost=config.max_task_cost,
            max_neutral_cost=config.max_neutral_cost,
            max_examples=config.max_examples,
            prompt_config=config.prompt.config(),
            find_config=dps.FindConfig(n_bootstraps=0),
            seed=config.seed,
            out=self.out / "found",
        )
        self.sweep = dps.steering_sweep(
            lab.model,
            self.users,
            self.methods(),
            k=config.k,
            strengths=config.strengths,
            n_random=config.n_random,
            max_examples=config.held_out,
            prompt_config=config.prompt.config(),
            seed=config.seed,
            out=self.out / "sweep",
        )

    def methods(self) -> dict[str, Any]:
        found, refs = self.found, self.lab.references(self.config.kinds)
        uniform = dps.Term("ablated", ablation=Uniform())
        methods: dict[str, Any] = {"cad": "cad", "adacad": "adacad", "dola": "dola"}
        methods |= {DPS: (DPS, found), PATCH: (PATCH, found), "dps, uniform": (uniform, found)}
        methods |= {f"{DPS}, {name}": (DPS, heads) for name, heads in refs.items()}
        methods |= {f"{PATCH}, {name}": (PATCH, heads) for name, heads in refs.items()}
        methods |= {
            "dps-js": ("dps-js", found),
            "amplify": ("amplify", found),
            "dps-patch+cad": ("dps-patch+cad", found),
        }
        if "retrieval" in refs:
            methods["decore"] = ("decore", refs["retrieval"])
        heads = {VECTOR: found.heads} | {f"{VECTOR}, {name}": one.top(self.config.k) for name, one in refs.items()}
        every = self.head_vectors("differences", reduce(HeadSet.__or__, heads.values()))
        for name, chosen in heads.items():
            methods |= self._with_control(name, "head_vector", every.only(chosen))
        for recipe, settings in {
            "generic": {"against": "generic"},
            "probe": {"recipe": "probe"},
            "persona": {"recipe": "persona"},
        }.items():
            name = f"{VECTOR}, {recipe}"
            methods |= self._with_control(name, "head_vector", self.head_vectors(name, found.heads, **settings))
        methods["head_vector+cad"] = ("head_vector+cad", methods[VECTOR][1])
        methods["head_vector+dps"] = ("head_vector+dps", (methods[VECTOR][1], found))
        return methods | self._with_control(STYLE, "vector", self.style_vectors())

    def head_vectors(self, name: str, heads: dps.HeadSet, **settings: Any) -> dps.HeadVectors:
        return dps.head_vectors(
            self.lab.model,
            self.users,
            heads,
            max_examples=self.config.vector_examples,
            prompt_config=self.config.prompt.config(),
            seed=self.config.seed,
            out=self.out / name.replace(", ", "_"),
            **settings,
        )

    def style_vectors(self) -> dict[str, dps.SteeringVector]:
        options: dict[str, Any] = {
            "max_examples": self.config.vector_examples,
            "prompt_config": self.config.prompt.config(),
        }
        made = {}
        for user in self.users:
            folder = self.out / STYLE / str(self.users.index(user))
            if not (folder / "vector.json").is_file():
                dps.style_vector(self.lab.model, user, **options).save(folder)
            made[user.id] = dps.SteeringVector.load(folder)
        return made

    def _with_control(self, name: str, rule: str, vectors: Mapping[str, Any]) -> dict[str, Any]:
        ids = [user.id for user in self.users]
        if missing := [user for user in ids if user not in vectors]:
            raise SteeringError(f"race: user {missing[0]!r} has no vector; leave the user out")
        after = {user: vectors[self.others[user]] for user in ids}
        return {name: (rule, vectors), another(name): (rule, after)}

    @cached_property
    def others(self) -> dict[str, str]:
        """For each user another one, whose vector was not made against the user's profile, which it would take away;
        the next one in the file where that cannot be."""
        ids = [user.id for user in self.users]
        against = {
            user.id: {
                donor.id
                for example in newest(user.discovery_examples(), self.config.vector_examples)
                for donor in donors_of(example, self.users, DONORS, self.config.seed)
            }
            for user in self.users
        }
        found = {}
        for place, user in enumerate(ids):
            after = ids[place + 1 :] + ids[:place]
            found[user] = next((other for other in after if user not in against[other]), after[0])
        return found


def another(name: str) -> str:
    return f"{name}, another user's"


def measure(config: Race, lab: Lab) -> Findings:
    corpora = [Corpus(name, config, lab) for name in config.corpora]
    changes = {kl: pd.concat([one.sweep.by_user(kl).assign(corpus=one.name) for one in corpora]) for kl in config.kls}
    decided = changes[config.decided_at]
    falls = {
        "head vectors make the users' own texts likelier": -decided[VECTOR],
        "they do so more than another user's": decided[another(VECTOR)] - decided[VECTOR],
        "they do so more than StyleVector": decided[STYLE] - decided[VECTOR],
        "counterfactual DPS is better than DPS that zeroes": decided[DPS] - decided[PATCH],
        "counterfactual DPS makes the users' own texts likelier": -decided[PATCH],
    }
    claims = [above_zero(name, interval(fall.to_numpy(), LEVEL)) for name, fall in falls.items()]
    tables = {
        "at KL": pd.concat([at_kl(frame).assign(KL=kl) for kl, frame in changes.items()], ignore_index=True),
        "by corpus": pd.concat(
            at_kl(frame).assign(corpus=name) for name, frame in decided.groupby("corpus", sort=False)
        ),
        "strengths": pd.concat([one.sweep.at_kl(config.decided_at).assign(corpus=one.name) for one in corpora]),
        "written": over_users(pd.concat([written(one, config) for one in corpora])),
    }
    return Findings(tables, [*claims])


def at_kl(frame: pd.DataFrame) -> pd.DataFrame:
    """Every method: change of the NLL, and its difference to random heads or another user's vector."""
    rows = []
    for name in (name for name in frame if name not in ("user", "corpus")):
        row = {"method": name, **interval(frame[name].to_numpy(), 0.95)}
        control = next((one for one in (f"{name} (random)", another(str(name))) if one in frame), None)
        if control is not None:
            rest = interval((frame[name] - frame[control]).to_numpy(), 0.95)
            row |= {"difference": rest["mean"], "difference_low": rest["low"], "difference_high": rest["high"]}
        rows.append(row)
    return pd.DataFrame(rows)


def written(corpus: Corpus, config: Race) -> pd.DataFrame:
    """What is measured of each user's text written at one KL, less that with the profile alone: `method`, `metric`,
    `user`, `change`."""
    strengths = corpus.sweep.at_kl(config.written_at).set_index("method")["strength"]
    tables = []
    methods: dict[str, Any] = {PATCH: (PATCH, corpus.found), DPS: (DPS, corpus.found), "cad": "cad"}
    methods["rag+head_vector"] = ("rag+head_vector", corpus.found.heads)
    for name, method in methods.items():
        if not np.isfinite(strengths[name.removeprefix("rag+")]):
            continue
        made = dps.evaluate(
            corpus.lab.model,
            corpus.users,
            {"rag": "rag", name: method},
            strengths=(float(strengths[name.removeprefix("rag+")]),),
            ks=(min(config.k, len(corpus.found.heads)),),
            max_examples=1,
            max_new_tokens=config.new_tokens,
            prompt_config=config.prompt.config(),
            evaluate_config=dps.EvaluateConfig(choose_on=0),
            seed=config.seed,
            out=corpus.out / f"written-{name}",
        )
        means = made.rows.groupby(["method", "user"], sort=False)[list(WRITTEN)].mean()
        change = (means.loc[name] - means.loc["rag"]).rename_axis("user").reset_index()
        tables.append(change.melt("user", var_name="metric", value_name="change").assign(method=name))
    return pd.concat(tables) if tables else pd.DataFrame({"method": [], "metric": [], "change": []})


def over_users(changes: pd.DataFrame) -> pd.DataFrame:
    """Mean of the users of all corpora, with its interval."""
    groups = changes.groupby(["method", "metric"], sort=False)["change"]
    return pd.DataFrame(
        {"method": method, "metric": metric, **interval(values.dropna().to_numpy(), 0.95)}
        for (method, metric), values in groups
    )


if __name__ == "__main__":
    main("race", __doc__ or "", Race, measure)
