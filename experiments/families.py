"""Do Preference Heads carry the profile, and induction, retrieval, function-vector and random heads not?

    python -m experiments.families --govblog DATA/govblog/lamp4_questions.json --acl DATA/acl/longlamp_abstract.jsonl

Heads are chosen on older documents (4 a blogger, 1 an author of abstracts) and tested on the newest (at most 4 and 1).
16 authors of abstracts; responses are cut at 48 tokens. Response positions, zero ablation. Random sets for every
family and K: 50 in `main`; 20, and the newest 2 headlines, in `variants`, `equal_data` and `harmless`; 10, and the
newest 2 headlines, in `patching` and `vectors`; 10 in `across`; 1 in `where` (no band; one headline of the first 6
bloggers). Every step is a run folder under `--out` and resumes; `--out/results.md` holds the tables, `mean (low to
high)` being 95% intervals over users. `--only harmless` is one more step, which takes half an hour.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import dps_lens as dps
from dps_lens.analysis.intervals import interval
from dps_lens.errors import ScoreError
from experiments import tables
from experiments.output_slices import score_slices

K = 10
KS = (1, 5, 10, 20)
MAX_COST = 0.05
WHERE_USERS = 6
PROMPT = dps.PromptConfig(response_tokens=48)
DISCOVERY = {"govblog": 4, "acl": 1}
HELD_OUT = {"govblog": 4, "acl": 1}
MAX_USERS = {"govblog": None, "acl": 16}
SIDE: dict[str, Any] = {"n_random": 20, "max_examples": 2}
"""Caps of the steps beside `main`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--govblog", required=True, help="LaMP-4 questions, outputs beside them")
    parser.add_argument("--acl", required=True, help="LongLaMP abstracts")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    parser.add_argument("--only", default="", help="comma-separated steps; all by default")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    model = dps.load_model(arguments.model)
    experiment = Experiment(model, {"govblog": arguments.govblog, "acl": arguments.acl}, arguments.out)
    steps = arguments.only.split(",") if arguments.only else list(STEPS)
    for step in steps:
        print(f"== {step}", file=sys.stderr, flush=True)
        (arguments.out / "tables").mkdir(parents=True, exist_ok=True)
        for name, table in (STEPS | EXTRA)[step](experiment).items():
            table.to_csv(arguments.out / "tables" / f"{name}.csv", index=False)
    write_results(arguments.out)


class Experiment:
    """Model, users and chosen heads; everything is measured when it is first asked for."""

    def __init__(self, model: Any, sources: Mapping[str, str], out: Path) -> None:
        self.model, self.out = model, out
        loaded = {name: dps.load_users(source, max_users=MAX_USERS[name]) for name, source in sources.items()}
        self.users = {name: [user for user in users if user.discovery_examples()] for name, users in loaded.items()}
        self._kept: dict[str, Any] = {}

    def keep(self, name: str, make: Any) -> Any:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def scores(self, corpus: str) -> dps.HeadScores:
        return self.keep(
            corpus,
            lambda: dps.score_heads(
                self.model,
                self.users[corpus],
                max_examples=DISCOVERY[corpus],
                prompt=PROMPT,
                out=self.out / corpus,
            ),
        )

    def against_others(self) -> dps.HeadScores:
        """Scores whose baseline is one other blogger's profile; 2 examples a blogger."""
        return self.keep(
            "against_others",
            lambda: dps.score_heads(
                self.model,
                self.users["govblog"],
                contrast="other_user",
                n_donors=1,
                max_examples=2,
                prompt=PROMPT,
                out=self.out / "against_others",
            ),
        )

    def refs(self) -> dict[str, dps.HeadScores]:
        return self.keep("refs", lambda: dps.reference_heads(self.model))

    def heads(self, corpus: str) -> dict[str, dps.HeadSet]:
        """Each user's tested heads, chosen by users in other folds."""
        saved = dps.SetEffects.load(self.out / "main").manifest["sets"]["preference"]
        return {user: dps.HeadSet.parse(sets[KS.index(K)]) for user, sets in saved.items()}


def agreement(e: Experiment) -> dict[str, pd.DataFrame]:
    """Do families and users share heads?"""
    families = {"preference (govblog)": e.scores("govblog"), "preference (acl)": e.scores("acl"), **e.refs()}
    between = dps.overlap({name: scores for name, scores in families.items() if scores.defined}, k=K)
    users = dps.overlap(e.scores("govblog"), k=K)
    between.plot().write_html(e.out / "overlap_families.html")
    users.plot().write_html(e.out / "overlap_users.html")
    specificity = users.specificity.assign(user_specific=users.user_specific, examples_in_a_half=users.manifest["half"])
    tops = pd.DataFrame(
        [
            {"family": name, "top 10": str(scores.top(K)) if scores.defined else scores.manifest["reason"]}
            for name, scores in families.items()
        ]
    )
    return {"overlap_families": between.to_frame(), "overlap_users": specificity, "top_heads": tops}


def main_curve(e: Experiment) -> dict[str, pd.DataFrame]:
    """The claim: families × K × condition on held-out headlines."""
    preference, refs = e.scores("govblog"), e.refs()
    effects = dps.ablation_curve(
        e.model,
        e.users["govblog"],
        {"preference": preference, "preference, not induction": preference, **refs},
        exclude={"preference, not induction": refs["induction"].top_share(0.02)},
        ks=KS,
        n_random=50,
        max_examples=HELD_OUT["govblog"],
        out=e.out / "main",
    )
    effects.plot().write_html(e.out / "main_taken.html")
    parts = [effects.to_frame(part=part).assign(part=part) for part in ("all", "copied", "rest")]
    return {"main": pd.concat(parts, ignore_index=True)}


def variants(e: Experiment) -> dict[str, pd.DataFrame]:
    """At K = 10: each user's own heads, a cluster's, the other corpus' heads, and output slices."""
    users, preference = e.users["govblog"], e.scores("govblog")
    clusters = dps.cluster_users(users, 4)
    effects = dps.ablation_curve(
        e.model,
        users,
        {
            "global heads": preference,
            "own heads": preference,
            "cluster's heads": clusters.heads(preference, K),
            "heads of acl authors": e.scores("acl").top(K),
            "output slices": slices_of(e),
        },
        select={"own heads": "user"},
        ks=(K,),
        **SIDE,
        out=e.out / "variants",
    )
    return {"variants": effects.to_frame()}


def harmless(e: Experiment) -> dict[str, pd.DataFrame]:
    """At K = 10, with random sets for every prompt: also without heads that cost over 0.05 nats where there is no
    profile, and heads scored against another blogger's profile."""
    preference = e.scores("govblog")
    costly = (preference.mean(of="no_profile") > MAX_COST).nonzero().tolist()
    effects = dps.ablation_curve(
        e.model,
        e.users["govblog"],
        {
            "preference": preference,
            "preference, harmless": preference,
            "preference, against others": e.against_others(),
            **e.refs(),
        },
        exclude={"preference, harmless": dps.HeadSet([(layer, head) for layer, head in costly])},
        ks=(K,),
        **SIDE,
        controls=("own", "no_profile", "other_user"),
        out=e.out / "harmless",
    )
    return {"harmless": effects.to_frame()}


def slices_of(e: Experiment) -> dps.HeadScores:
    return score_slices(e.model, e.users["govblog"], prompt=PROMPT, max_examples=1, out=e.out / "slices")


def equal_data(e: Experiment) -> dict[str, pd.DataFrame]:
    """True heads and output slices, both chosen on each user's newest discovery example."""
    effects = dps.ablation_curve(
        e.model,
        e.users["govblog"],
        {"heads, one example a user": e.scores("govblog").newest(1), "output slices": slices_of(e)},
        ks=(K,),
        **SIDE,
        out=e.out / "equal_data",
    )
    return {"equal_data": effects.to_frame()}


def across(e: Experiment) -> dict[str, pd.DataFrame]:
    """The other way round: heads of govblog tested on acl abstracts."""
    bloggers = {user.id for user in e.users["govblog"][16:]}
    sixteen = e.scores("govblog").newest(1).without(bloggers)
    effects = dps.ablation_curve(
        e.model,
        e.users["acl"],
        {
            "preference (acl)": e.scores("acl"),
            "preference (govblog)": e.scores("govblog").top(K),
            "preference (govblog, 16 examples)": sixteen.top(K),
            **{name: scores.top(K) for name, scores in e.refs().items() if scores.defined},
        },
        ks=(K,),
        n_random=10,
        max_examples=HELD_OUT["acl"],
        out=e.out / "across",
    )
    return {"across": effects.to_frame()}


def patching(e: Experiment) -> dict[str, pd.DataFrame]:
    """Necessity, sufficiency, and preference vectors."""
    families = {"preference": e.scores("govblog"), **e.refs()}
    options = {**SIDE, "ks": (K, 40), "n_random": 10}
    patched = dps.patch_heads(e.model, e.users["govblog"], families, out=e.out / "patching", **options)
    vectors = dps.vector_recovery(e.model, e.users["govblog"], families, out=e.out / "vectors", **options)
    return {"patching": patched.to_frame(), "vectors": vectors.to_frame()}


def where(e: Experiment) -> dict[str, pd.DataFrame]:
    """The same heads ablated where they read, where they write, everywhere; 6 users, one example each, 1 random set."""
    families = {"preference": e.heads("govblog")}
    families |= {name: scores.top(K) for name, scores in e.refs().items() if scores.defined}  # type: ignore[misc]
    users, found = e.users["govblog"][:WHERE_USERS], []
    for positions in ("response", "profile", "all"):
        effects = dps.ablation_curve(
            e.model,
            users,
            families,
            ks=(K,),
            n_random=1,
            positions=positions,  # type: ignore[arg-type]
            prompt=PROMPT,
            max_examples=1,
            neutral=(),
            out=e.out / f"where_{positions}",
        )
        found.append(effects.to_frame().assign(positions=positions))
    return {"where": pd.concat(found, ignore_index=True), "attention": attention(e)}


def attention(e: Experiment) -> pd.DataFrame:
    """Share of attention that ten heads of each family pay to the profile from the response."""
    rows = []
    users = e.users["govblog"]
    families = {"preference": e.heads("govblog")}
    families |= {name: dict.fromkeys(families["preference"], s.top(K)) for name, s in e.refs().items() if s.defined}
    for name, heads in families.items():
        options = {"max_examples": 1, "prompt": PROMPT, "progress": False}
        frame = pd.concat([dps.profile_attention(e.model, [user], heads[user.id], **options) for user in users])
        frame["target"] = frame["target"].str.replace(r"item \d+", "profile", regex=True)
        by_user = frame.groupby(["user", "head", "target"])["attention"].sum().groupby(["user", "target"]).mean()
        for target, values in by_user.groupby("target"):
            rows.append({"family": name, "target": target, **interval(values.to_numpy())})
    return pd.DataFrame(rows)


def writing(e: Experiment) -> dict[str, pd.DataFrame]:
    """ROUGE-L of headlines written without the heads."""
    texts = dps.ablated_generation(
        e.model,
        e.users["govblog"],
        {"preference": e.scores("govblog"), **e.refs()},
        k=K,
        n_random=3,
        max_examples=1,
        max_new_tokens=24,
        out=e.out / "writing",
    )
    return {"writing": texts.to_frame()}


STEPS = {
    "agreement": agreement,
    "main": main_curve,
    "variants": variants,
    "equal_data": equal_data,
    "across": across,
    "patching": patching,
    "where": where,
    "writing": writing,
}
EXTRA = {"harmless": harmless}


def write_results(out: Path) -> None:
    """The tables of every step that has been run."""
    parts = [__doc__ or ""]
    for name, make in SECTIONS.items():
        try:
            parts.append(f"## {name}\n\n{make(out)}\n")
        except (FileNotFoundError, ScoreError):
            continue  # the step has not been run
    (out / "results.md").write_text("\n".join(parts), encoding="utf-8")


def _of(folder: str, *names: str) -> Callable[[Path], str]:
    """Tables of one run folder; a name is a method of `tables.Effects`, with `:K` where it takes a K."""

    def make(out: Path) -> str:
        effects = tables.Effects(out / folder)
        split = (name.split(":") for name in names)
        return "\n\n".join(getattr(effects, method)(*map(int, arguments)) for method, *arguments in split)

    return make


SECTIONS: dict[str, Callable[[Path], str]] = {
    "main": _of("main", "full", "families", f"copying:{K}"),
    "harmless": _of("harmless", "families", f"other:{K}"),
    "variants": _of("variants", "families"),
    "equal_data": _of("equal_data", "families"),
    "across": _of("across", "full", "families", f"copying:{K}"),
    "agreement": tables.agreement,
    "patching": _of("patching", "full", "measures"),
    "vectors": _of("vectors", "measures"),
    "where": tables.where,
    "writing": tables.writing,
}


if __name__ == "__main__":
    main()
