"""Do Preference Heads carry personalisation, more than other families do, and is it all that they carry?

    python -m experiments.exp_causality [--config FILE.yaml] [--out runs/causality]

Question. What do the top heads by profile-specific PCS, by the paper's PCS, and the top retrieval, induction and
function-vector heads take of the personalisation gain, and at what cost to text without a profile?

Hypotheses, for the top 10 by profile-specific PCS. (1) Necessary: ablating them takes more of the gain than random sets
do. (2) Specific to preference: it takes more than ablating 10 retrieval, induction or function-vector heads.
(3) Selective: it takes more of the gain than it costs where there is no profile. (4) Sufficient: putting their outputs
of the run with profile into the run without recovers more of the gain than random sets do.

Measure. `taken`: gain (NLL without profile − NLL with the own) of the model less that of the ablated model, nats per
token. `harm`: cost without profile; `neutral`: cost on prose of nobody. `necessity` (noising) and `sufficiency`
(denoising): loss, and recovery, when z is exchanged with the run without profile. K of 1, 5, 10 and 20. Newest
headlines; heads chosen on older documents by users of other folds. Intervals over users.

Control. 20 random sets for every family and K, of the same layers and disjoint.

Decision rule, at K = 10. (1), (4): by the interval of the difference to random sets, over users and draws: supported
above 0, not supported below, else undecided. (2): supported if all three paired differences, at 98.3% each, lie above
0; not supported if one lies below; else undecided. (3): by the interval of taken − harm, as (1).
"""

from typing import Any

import pandas as pd

import dps_lens as dps
from dps_lens.analysis.intervals import interval
from experiments.held_out import by_user, paired, papers, shown
from experiments.setup import Claim, Config, Findings, Lab, Outcome, decide, main

OURS = "profile-specific PCS"
EDITED = ("taken", "taken (other)", "harm", "neutral")
PATCHED = ("necessity", "sufficiency")


class Causality(Config):
    ks: tuple[int, ...] = (1, 5, 10, 20)
    k: int = 10
    n_random: int = 20
    held_out: int = 2
    kinds: tuple[str, ...] = ("retrieval", "induction", "function_vector")


def measure(config: Causality, lab: Lab) -> Findings:
    users = lab.users()
    scores = lab.scores(users)
    refs = {name: found for name, found in lab.references(config.kinds).items() if found.defined}
    families: dict[str, Any] = {OURS: scores, "the paper's PCS": papers(scores), **refs}
    options: dict[str, Any] = {"ks": config.ks, "n_random": config.n_random, "max_examples": config.held_out}
    options |= {"seed": config.seed}
    edited = dps.ablation_curve(lab.model, users, families, **options, out=lab.out / "ablated")
    patched = dps.patch_heads(lab.model, users, families, **options, out=lab.out / "patched")
    full = edited.to_frame().query("k == 0")[["measure", "mean", "low", "high"]]
    against = pd.DataFrame(paired(edited, OURS, list(refs), config.k))
    selective = pd.DataFrame(
        [{"family": name, "k": config.k, **selectivity(edited, name, config.k)} for name in families]
    )
    tables = {
        "full model": full,
        "ablated": shown(edited, EDITED),
        "patched": shown(patched, PATCHED),
        "taken, more than other families": against,
        "taken − harm": selective,
    }
    claims = [
        against_random(
            "necessary: ablating them takes more of the gain than random sets do", tables["ablated"], "taken", config.k
        ),
        against_families(against),
        by_interval("selective: it takes more than it costs without a profile", selective.iloc[0].to_dict()),
        against_random(
            "sufficient: patching them in recovers more than random sets do", tables["patched"], "sufficiency", config.k
        ),
    ]
    return Findings(tables, claims)


def selectivity(effects: dps.SetEffects, family: str, k: int) -> dict[str, float]:
    return interval(by_user(effects, family, k, "taken") - by_user(effects, family, k, "harm"))


def by_interval(hypothesis: str, row: dict[str, Any]) -> Claim:
    return Claim(hypothesis, "the interval lies above 0", row, decide(row["low"], row["high"]))


def against_random(hypothesis: str, frame: pd.DataFrame, measure: str, k: int) -> Claim:
    (row,) = frame[(frame["family"] == OURS) & (frame["k"] == k) & (frame["measure"] == measure)].to_dict("records")
    found = {"mean": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}
    return by_interval(hypothesis, found)


def against_families(frame: pd.DataFrame) -> Claim:
    outcomes = [decide(row["low"], row["high"]) for row in frame.to_dict("records")]
    outcome: Outcome = "undecided"
    if "not supported" in outcomes:
        outcome = "not supported"
    elif outcomes and set(outcomes) == {"supported"}:
        outcome = "supported"
    measured = frame.set_index("than")[["mean", "low", "high"]].to_dict("index") if len(frame) else {}
    return Claim("specific: it takes more than other families do", "every interval lies above 0", measured, outcome)


if __name__ == "__main__":
    main("causality", __doc__ or "", Causality, measure)
