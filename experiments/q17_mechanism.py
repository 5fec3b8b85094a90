"""What do Preference Heads do: copy words, or carry something else, and who feeds them?

    python -m experiments.q17_mechanism [--config FILE.yaml] [--out runs/mechanism]

Question. Of the heads that `find_heads` finds, how many copy, do they act on the output themselves, and do induction
heads feed them?

Hypotheses. (1) At least half of them copy. (2) Together they act directly: what they write past all other layers is
more than half of what patching them one by one changes. (3) An induction head that is none of them feeds one of them.

Measure. K heads, found on the newest discovery example of each user, described on the newest evaluation example
(`describe_head`), against another user's profile. A head copies if it attends to the token that it is written next, and
raises the logits of what it attends to, both more than the other heads of its layer do. Paths (`patch_paths`) into
queries, keys and values of the found heads, from the found heads and as many induction heads. Beside them: overlap with
every known family.

Control. Other heads of the same layer, at random, in every dossier and in the place of every sender.

Decision rule. (1) A head counts where both intervals of the difference to other heads lie above 0, over users, at
1 − 0.05 / K; supported if at least half of the heads count, else not supported. (2) by the interval over users of
direct − half of the total effect, summed over the heads: supported above 0, not supported below, else undecided. (3)
supported if an edge from an induction head that was not found into a found one survives at a family-wise 0.05 over all
edges; else undecided. Three hypotheses, each reported; no further correction.
"""

from typing import Any

import pandas as pd

import dps_lens as dps
from dps_lens.dossier.result import DIRECTION
from dps_lens.errors import ScoreError
from dps_lens.families import KINDS
from dps_lens.stats.intervals import columns, interval, user_means
from experiments.lib.harness import Claim, Config, Findings, Lab, Outcome, above_zero, main

COPIES = ("token that is written", "what it looks at")
SHOWN = (
    *COPIES,
    "copying eigenvalues",
    DIRECTION,
    "profile, beyond a null response",
    "own text",
    "directly",
    "patched",
)


class Mechanism(Config):
    k: int = 10
    n_random: int = 4
    n_beside: int = 2
    kinds: tuple[str, ...] = KINDS


def measure(config: Mechanism, lab: Lab) -> Findings:
    users, prompt = lab.users(), config.prompt.config()
    found = dps.find_heads(
        lab.model,
        users,
        config.k,
        max_examples=1,
        prompt_config=prompt,
        find_config=dps.FindConfig(folds=False, n_bootstraps=0),
        seed=config.seed,
        out=lab.out / "found",
    )
    references = lab.references(config.kinds)
    if "induction" not in references:
        raise ScoreError(f"mechanism: {lab.undefined.get('induction', 'kinds= leaves out induction heads')}")
    retrieval = dps.ProfileRetrieval(users, items=max(1, prompt.items // 2), prompt_config=prompt, seed=config.seed)
    style = dps.StyleModulation(users, max_examples=config.max_examples, prompt_config=prompt, seed=config.seed)
    references |= dps.reference_heads(lab.model, (retrieval, style), cache=lab.out / "families")
    dossiers = {
        str(head): dps.describe_head(
            lab.model,
            users,
            head,
            families=references,
            n_random=config.n_random,
            prompt_config=prompt,
            seed=config.seed,
            out=lab.out / "dossiers" / str(head),
        )
        for head in found.heads
    }
    induction = references["induction"].top(config.k)
    effects = dps.patch_paths(
        lab.model,
        users,
        found.heads | induction,
        found.heads,
        n_random=config.n_beside,
        prompt_config=prompt,
        seed=config.seed,
        out=lab.out / "paths",
    )
    edges, heads = effects.edges(seed=config.seed), effects.heads_frame()
    lines = described(dossiers, 1 - 0.05 / config.k)
    named = {name.replace("_", " "): scores for name, scores in references.items()}
    sets: dict[str, dps.FoundHeads | dps.HeadScores] = {"preference": found, **named}
    between = dps.overlap(sets, k=config.k, seed=config.seed)
    between.save(lab.out / "overlap")
    tables = {
        "heads": lines.assign(induction=[name in map(str, induction) for name in lines["head"]]),
        "edges": edges[edges["survives"]] if edges["survives"].any() else edges.head(20),
        "totals": heads,
        "tokens": tokens_of(dossiers),
        "families": between.to_frame(),
    }
    claims = [
        copying(lines),
        above_zero("the heads act on the output directly, more than half", directly(effects, found.heads)),
        feeding(edges, found.heads, induction),
    ]
    return Findings(tables, claims)


def described(dossiers: dict[str, dps.Dossier], level: float) -> pd.DataFrame:
    """One row a head: the measures that decide, their differences to other heads, and whether it copies."""
    rows = []
    for name, dossier in dossiers.items():
        frame = dossier.to_frame(level=level).set_index("measure")
        row: dict[str, Any] = {"head": name}
        for measure in SHOWN:
            row[measure] = frame.loc[measure, "mean"]
            row[f"{measure}, other heads"] = frame.loc[measure, "control"]
        for measure in COPIES:
            ends = {"mean": "difference", "low": "difference_low", "high": "difference_high"}
            bounds = {end: float(frame.loc[measure, column]) for end, column in ends.items()}
            row |= columns(f"{measure}, difference", bounds)
        row["copies"] = bool((frame.loc[list(COPIES), "difference_low"] > 0).all())
        row |= {f"rank as {family}": found["rank"] for family, found in dossier.ranks.items()}
        row |= {"raises": " ".join(dossier.raised[:5]), "lowers": " ".join(dossier.lowered[:5])}
        row["read by"] = " ".join(f"{head} ({into})" for head, into, _ in dossier.readers[:3])
        rows.append(row)
    return pd.DataFrame(rows)


def tokens_of(dossiers: dict[str, dps.Dossier]) -> pd.DataFrame:
    """What every kind of token has of the effect of patching each head."""
    frames = []
    for name, dossier in dossiers.items():
        frame = dossier.to_frame()
        frames.append(frame[frame["section"] == "per token"].assign(head=name))
    return pd.concat(frames)[["head", "measure", "mean", "low", "high", "control"]]


def directly(effects: dps.PathEffects, heads: dps.HeadSet) -> dict[str, float]:
    """Direct less half of the total effect, summed over heads; by user."""
    places = [effects.nodes.heads.index(head) for head in heads]
    values = (effects.direct[:, places] - effects.total[:, places] / 2).sum(1)
    return interval(user_means(values, effects.user_ids))


def copying(lines: pd.DataFrame) -> Claim:
    count = int(lines["copies"].sum())
    measured = {"copy": count, "of": len(lines)}
    rule = "at least half of the heads count"
    return Claim(
        "at least half of the heads copy", rule, measured, "supported" if 2 * count >= len(lines) else "not supported"
    )


def feeding(edges: pd.DataFrame, heads: dps.HeadSet, induction: dps.HeadSet) -> Claim:
    others = {str(head) for head in induction - heads}
    fed = edges[edges["source"].isin(others) & edges["target"].isin({str(head) for head in heads})]
    measured = {"edges": len(fed), "survive": int(fed["survives"].sum()), "least p": float(fed["p"].min())}
    rule = "one such edge survives at a family-wise 0.05"
    outcome: Outcome = "supported" if fed["survives"].any() else "undecided"
    return Claim("an induction head that was not found feeds a found one", rule, measured, outcome)


if __name__ == "__main__":
    main("mechanism", __doc__ or "", Mechanism, measure)
