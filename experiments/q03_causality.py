"""Do Preference Heads carry personalisation, more than other families do, and is it all that they carry?

    python -m experiments.q03_causality [--config FILE.yaml] [--out runs/causality]

Question. What do the top heads by profile-specific PCS, by the paper's PCS, and the top retrieval, induction and
function-vector heads take of the personalisation gain, and at what cost to text without a profile?

Hypotheses, for the top 10 by profile-specific PCS. (1) Necessary: ablating them takes more of the gain than random sets
do. (2) Specific to preference: it takes more than ablating 10 retrieval, induction or function-vector heads.
(3) Selective: it takes more of the gain than it costs where there is no profile. (4) Sufficient: putting their outputs
of the run with profile into the run without recovers more of the gain than random sets do.

Measure. `gain_removed`: gain (NLL without profile − NLL with the own) of the model less that of the ablated model, nats
per token. `task_cost`: cost without profile; `neutral_cost`: cost on prose of nobody. `necessity` (noising) and
`sufficiency` (denoising): loss, and recovery, when z is exchanged with the run without profile. K of 1, 5, 10 and 20.
Newest headlines; heads chosen on older documents by users of other folds. Intervals over users.

Control. 20 random sets for every family and K, of the same layers and disjoint.

Decision rule, at K = 10. (1), (4): by the interval of the difference to random sets, over users and draws: supported
above 0, not supported below, else undecided. (2): supported if all three paired differences, at 98.3% each, lie above
0; not supported if one lies below; else undecided. (3): by the interval of `gain_removed` − `task_cost`, as (1).
"""

from typing import Any

import pandas as pd

import dps_lens as dps
from dps_lens.stats.intervals import interval
from experiments.lib.harness import Config, Findings, Lab, above_zero, all_above_zero, main
from experiments.lib.held_out import beyond_random, by_user, full, paired, papers, shown

OURS = "profile-specific PCS"
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
    refs = lab.references(config.kinds)
    families: dict[str, Any] = {OURS: scores, "the paper's PCS": papers(scores), **refs}
    options: dict[str, Any] = {"ks": config.ks, "n_random": config.n_random, "max_examples": config.held_out}
    options |= {"seed": config.seed}
    edited = dps.ablation_curve(lab.model, users, families, **options, out=lab.out / "ablated")
    patched = dps.patch_heads(lab.model, users, families, **options, out=lab.out / "patched")
    against = paired(edited, OURS, list(refs), config.k)
    selective = pd.DataFrame(
        [{"family": name, "k": config.k, **selectivity(edited, name, config.k)} for name in families]
    )
    tables = {
        "full model": full(edited),
        "ablated": shown(edited),
        "patched": shown(patched, PATCHED),
        "taken, more than other families": against,
        "taken − task cost": selective,
    }
    others = {row["than"]: row for row in against.to_dict("records")}
    necessary = beyond_random(edited, OURS, config.k, "gain_removed")
    sufficient = beyond_random(patched, OURS, config.k, "sufficiency")
    claims = [
        above_zero("necessary: ablating them takes more of the gain than random sets do", necessary),
        all_above_zero("specific: it takes more than other families do", others),
        above_zero("selective: it takes more than it costs without a profile", selective.iloc[0]),
        above_zero("sufficient: patching them in recovers more than random sets do", sufficient),
    ]
    return Findings(tables, claims)


def selectivity(effects: dps.SetEffects, family: str, k: int) -> dict[str, float]:
    return interval(by_user(effects, family, k, "gain_removed") - by_user(effects, family, k, "task_cost"))


if __name__ == "__main__":
    main("causality", __doc__ or "", Causality, measure)
