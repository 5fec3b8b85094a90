"""Do Preference Heads carry the profile, and induction, retrieval, function-vector and random heads not?

    python -m experiments.q11_families [--config FILE.yaml] [--out runs/families]

Question. Which family carries the gain, for which K, whose heads, on which texts, where, and what else does it carry?

Hypotheses, the paper's, put into this form when the numbers were known. (1) Ablating the top 10 Preference Heads takes
more of the gain over no profile than random sets do. (2) It takes more than 10 heads of any other family do. (3) It
takes some of the gain over another user's profile.

Measure. As in q03_causality, also in copied tokens and in the rest. Heads are chosen on older documents (4 a blogger, 1
an author of abstracts), by users of other folds, and tested on the newest (at most 4 and 1); 16 authors; responses are
cut at 48 tokens. `main`: families × K, and Preference Heads without the top 2% of induction heads. `variants`: heads of
each user, of a cluster by text, of the authors, and output slices; `equal_data`: slices beside heads of one example a
user. `across`: the bloggers' heads on abstracts. `patching`: also preference vectors and head vectors. `where`: edits
at the response, the profile, everywhere, and attention from the response. `writing`: greedy headlines without the
heads. `harmless`, half an hour more and not among the default steps: Preference Heads without those that cost over 0.05
nats where there is no profile, and heads scored against another blogger's profile.

Control. Random sets of the same layers for every family and K: 50 in `main`; 20, and the newest 2 headlines, in
`variants`, `equal_data` and `harmless`; 10, and the newest 2 headlines, in `patching`; 10 in `across`; 3 in `writing`;
1 in `where` (no band; one headline of the first 6 bloggers).

Decision rule, at K = 10 in `main`. (1) by the interval of the difference to random sets, (3) by that of the part of the
gain over another's profile: supported above 0, not supported below, else undecided. (2): supported if all paired
differences, corrected for their number, lie above 0; not supported if one lies below; else undecided.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

import dps_lens as dps
from dps_lens import literals
from dps_lens.selection import HeadSource
from dps_lens.stats.intervals import interval
from experiments.lib.harness import LONG, Claim, Config, Findings, Lab, Prompts, above_zero, all_above_zero, main
from experiments.lib.held_out import beyond_random, by_user, copying, full, paired, shown
from experiments.lib.measured import cross_fitted
from experiments.lib.output_slices import score_slices

OURS = "preference"
SIDES: tuple[literals.Positions, ...] = ("response", "profile", "all")
Step = Literal["agreement", "main", "variants", "equal_data", "across", "patching", "where", "writing", "harmless"]
Tables = dict[str, pd.DataFrame]


class Families(Config):
    prompt: Prompts = LONG
    other_users: str = "acl/longlamp_abstract.jsonl"
    max_other_users: int = 16
    steps: tuple[Step, ...] = ("agreement", "main", "variants", "equal_data", "across", "patching", "where", "writing")
    kinds: tuple[str, ...] = ("induction", "retrieval", "function_vector")
    k: int = 10
    ks: tuple[int, ...] = (1, 5, 10, 20)
    patched_ks: tuple[int, ...] = (10, 40)
    n_random: int = 50
    held_out: int = 4
    side_random: int = 20
    few_random: int = 10
    side_held_out: int = 2
    n_clusters: int = 4
    where_users: int = 6
    written_random: int = 3
    new_tokens: int = 24


class Given(NamedTuple):
    """What every step starts from; `others` and `foreign` are the authors of abstracts and their scores."""

    config: Families
    lab: Lab
    users: list[dps.User]
    others: list[dps.User]
    scores: dps.HeadScores
    foreign: dps.HeadScores
    refs: dict[str, dps.HeadScores]

    def curve(
        self, step: str, families: Mapping[str, HeadSource], users: Sequence[dps.User] | None = None, **options: Any
    ) -> dps.SetEffects:
        """`ablation_curve` as the steps beside `main` ask for it."""
        config = self.config
        settings: dict[str, Any] = {"ks": (config.k,), "n_random": config.side_random, "seed": config.seed}
        settings |= {"max_examples": config.side_held_out, **options}
        return dps.ablation_curve(self.lab.model, users or self.users, families, **settings, out=self.lab.out / step)

    def heads(self) -> dict[str, dps.HeadSet]:
        """Each user's tested heads, chosen by users in other folds."""
        return cross_fitted(self.scores, self.users, self.config.k, self.config.seed)

    def slices(self) -> dps.HeadScores:
        prompt = self.config.prompt.config()
        out = self.lab.out / "slices"
        return score_slices(self.lab.model, self.users, prompt_config=prompt, max_examples=1, out=out)


def measure(config: Families, lab: Lab) -> Findings:
    users, others = lab.users(), lab.users(config.other_users, max_users=config.max_other_users)
    scores, foreign = lab.scores(users), lab.scores(others, max_examples=1)
    given = Given(config, lab, users, others, scores, foreign, lab.references(config.kinds))
    tables = {name: table for step in config.steps for name, table in STEPS[step](given).items()}
    return Findings(tables, claims(given) if "main" in config.steps else [])


def against_others(users: Sequence[dps.User], lab: Lab) -> dps.HeadScores:
    """Scores against one other blogger's profile; 2 examples a blogger."""
    return lab.scores(users, against="other_user", max_examples=2, score_config=dps.ScoreConfig(n_donors=1))


def costly(scores: dps.HeadScores, cost: float = 0.05) -> dps.HeadSet:
    """Heads whose ablation costs more than this where there is no profile."""
    return dps.HeadSet([(layer, head) for layer, head in (scores.mean(of="no_profile") > cost).nonzero().tolist()])


def agreement(given: Given) -> Tables:
    """Do families and users share heads?"""
    k, seed = given.config.k, given.config.seed
    families = {"preference (govblog)": given.scores, "preference (acl)": given.foreign, **given.refs}
    between, users = dps.overlap(families, k=k, seed=seed), dps.overlap(given.scores, k=k, seed=seed)
    return {
        "top heads": pd.DataFrame([{"family": name, f"top {k}": str(of.top(k))} for name, of in families.items()]),
        "overlap of families": between.to_frame(),
        "halves of users": pd.DataFrame(users.specificity).assign(**{"user-specific": users.user_specific}),
    }


def main_curve(given: Given) -> Tables:
    """Families × K × condition on held-out headlines."""
    config, less = given.config, "preference, not induction"
    exclude = {less: given.refs["induction"].top_share(0.02)} if "induction" in given.refs else {}
    families = {OURS: given.scores, **dict.fromkeys(exclude, given.scores), **given.refs}
    options: dict[str, Any] = {"ks": config.ks, "n_random": config.n_random, "max_examples": config.held_out}
    effects = given.curve("main", families, **options, held_out_config=dps.HeldOutConfig(exclude=exclude))
    return {"full model": full(effects), "main": shown(effects), "copying": copying(effects)}


def claims(given: Given) -> list[Claim]:
    effects, k = dps.SetEffects.load(given.lab.out / "main"), given.config.k
    than = {row["than"]: row for row in paired(effects, OURS, list(given.refs), k).to_dict("records")}
    over_others = interval(by_user(effects, OURS, k, "gain_removed_other"))
    beyond = beyond_random(effects, OURS, k, "gain_removed")
    return [
        above_zero("Preference Heads take more of the gain than random sets do", beyond),
        all_above_zero("they take more than other families do", than),
        above_zero("they take some of the gain over another user's profile", over_others),
    ]


def variants(given: Given) -> Tables:
    """Each user's own heads, a cluster's, the authors' heads, and output slices."""
    k, clusters = given.config.k, dps.cluster_users(given.users, given.config.n_clusters, seed=given.config.seed)
    families: dict[str, HeadSource] = {
        "global heads": given.scores,
        "own heads": given.scores,
        "cluster's heads": clusters.heads(given.scores, k),
        "heads of acl authors": given.foreign.top(k),
        "output slices": given.slices(),
    }
    return {"variants": shown(given.curve("variants", families, select={"own heads": "user"}))}


def equal_data(given: Given) -> Tables:
    """True heads and output slices, both chosen on each user's newest discovery example."""
    families = {"heads, one example a user": given.scores.newest(1), "output slices": given.slices()}
    return {"equal data": shown(given.curve("equal_data", families))}


def across(given: Given) -> Tables:
    """Heads of bloggers tested on abstracts."""
    k, n = given.config.k, given.config.max_other_users
    few = given.scores.newest(1).take(list(range(min(n, len(given.users)))))
    families: dict[str, HeadSource] = {
        "preference (acl)": given.foreign,
        "preference (govblog)": given.scores.top(k),
        f"preference (govblog, {n} examples)": few.top(k),
        **{name: scores.top(k) for name, scores in given.refs.items()},
    }
    effects = given.curve("across", families, given.others, n_random=given.config.few_random, max_examples=1)
    return {"across, full model": full(effects), "across": shown(effects), "across, copying": copying(effects)}


def patching(given: Given) -> Tables:
    """Necessity, sufficiency, preference vectors, and differences at the heads."""
    config, families = given.config, {OURS: given.scores, **given.refs}
    options: dict[str, Any] = {"ks": config.patched_ks, "n_random": config.few_random, "seed": config.seed}
    options |= {"max_examples": config.side_held_out}
    model, users, out = given.lab.model, given.users, given.lab.out
    patched = dps.patch_heads(model, users, families, out=out / "patching", **options)
    tables = {"patching, full model": full(patched), "patching": shown(patched, patched.measures)}
    forms = {"vectors": dps.VectorConfig(), "differences": dps.VectorConfig(against="other_user")}
    for name, form in forms.items():
        made = dps.vector_recovery(model, users, families, vector_config=form, out=out / name, **options)
        tables[name] = shown(made, made.measures)
        tables[f"{name}, beyond another's"] = beyond_another(made)
    return tables


def beyond_another(effects: dps.SetEffects) -> pd.DataFrame:
    """What a user's vector brings back more than another user's, over the same users; level corrected for the rows."""
    rows = [(family, k) for k in effects.ks for family in effects.families]
    return pd.DataFrame(
        {
            "family": family,
            "k": k,
            **interval(
                by_user(effects, family, k, "recovered") - by_user(effects, family, k, "recovered_other"),
                1 - 0.05 / len(rows),
            ),
        }
        for family, k in rows
    )


def where(given: Given) -> Tables:
    """The same heads ablated where they read, where they write, everywhere, and what they attend to."""
    refs = {name: scores.top(given.config.k) for name, scores in given.refs.items()}
    families: dict[str, HeadSource] = {OURS: given.heads(), **refs}
    options: dict[str, Any] = {"n_random": 1, "max_examples": 1, "prompt_config": given.config.prompt.config()}
    users, found = given.users[: given.config.where_users], []
    for side in SIDES:
        options["held_out_config"] = dps.HeldOutConfig(positions=side, neutral=())
        effects = given.curve(f"where_{side}", families, users, **options)
        found.append(shown(effects, ("gain_removed", "task_cost")).assign(positions=side))
    return {"where": pd.concat(found, ignore_index=True), "attention": attention(given)}


def attention(given: Given) -> pd.DataFrame:
    """Share of attention that the heads of each family pay from the response."""
    own, rows = given.heads(), []
    families = {OURS: own} | {name: dict.fromkeys(own, of.top(given.config.k)) for name, of in given.refs.items()}
    options: dict[str, Any] = {"max_examples": 1, "prompt_config": given.config.prompt.config()}
    options |= {"run_config": dps.RunConfig(progress=False)}
    for name, heads in families.items():
        of_users = [dps.profile_attention(given.lab.model, [one], heads[one.id], **options) for one in given.users]
        frame = pd.concat(of_users)
        frame["target"] = frame["target"].str.replace(r"item \d+", "profile", regex=True)
        by_target = frame.groupby(["user", "head", "target"])["attention"].sum().groupby(["user", "target"]).mean()
        for target, values in by_target.groupby("target"):
            rows.append({"family": name, "target": target, **interval(values.to_numpy())})
    return pd.DataFrame(rows)


def writing(given: Given) -> Tables:
    """ROUGE-L of headlines written without the heads."""
    config, families = given.config, {OURS: given.scores, **given.refs}
    options: dict[str, Any] = {"k": config.k, "n_random": config.written_random, "seed": config.seed}
    options |= {"max_examples": 1, "max_new_tokens": config.new_tokens, "out": given.lab.out / "writing"}
    return {"writing": dps.ablated_generation(given.lab.model, given.users, families, **options).to_frame()}


def harmless(given: Given) -> Tables:
    """Without heads that cost where there is no profile, and heads scored against another's profile; random sets for
    every prompt."""
    less = "preference, harmless"
    families = {OURS: given.scores, less: given.scores}
    families |= {"preference, against others": against_others(given.users, given.lab), **given.refs}
    held_out = dps.HeldOutConfig(exclude={less: costly(given.scores)}, controls=("own", "no_profile", "other_user"))
    return {"harmless": shown(given.curve("harmless", families, held_out_config=held_out))}


STEPS: dict[Step, Callable[[Given], Tables]] = {
    "agreement": agreement,
    "main": main_curve,
    "variants": variants,
    "equal_data": equal_data,
    "across": across,
    "patching": patching,
    "where": where,
    "writing": writing,
    "harmless": harmless,
}

if __name__ == "__main__":
    main("families", __doc__ or "", Families, measure)
