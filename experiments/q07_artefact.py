"""How much of a published effect can three choices of a detector make?

    python -m experiments.q07_artefact [--config FILE.yaml] [--out runs/artefact]

Question. Published detectors zero slices of the output of `o_proj` and call them heads; heads are scored on the items
that are evaluated; and the contrast of CAD, meant to be without context, can still hold it. What does each change?

Hypotheses. (1) The heads that output slices name take less of the gain than true heads chosen on the same posts.
(2) A user's own heads seem to take more of the gain when they were chosen on the tested post. (3) So do heads chosen by
all users. (4) CAD makes the users' text likelier than CAD with a leaking context, which is greedy decoding.

Measure. The newest headline of every user. Top 10 by profile-specific PCS, scored on one older post a user, or on the
tested post itself; ranked by all users, or by each user alone; and the top 10 output slices, ablated as the heads of
that name and as the slices that they are. `gain_removed` and `task_cost` as in q03_causality. CAD, teacher-forced, at
strengths 0.5 and 1: change of the NLL of the user's headline when the contrast holds no document, half of them, or all.

Control. 20 random sets of the same layers for every set of heads. The older post is the control of the tested one.

Decision rule. By the 95% intervals over users of the paired differences: (1) true heads − slices; (2), (3) tested −
older post, gain taken; (4) NLL with leak − without, at strength 0.5. Supported above 0, not supported below or at 0,
else undecided.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

import dps_lens as dps
from dps_lens.data import Example, User, build_prompt
from dps_lens.data.examples import data_digest
from dps_lens.evaluation.forced import Forced
from dps_lens.model.losses import token_losses
from dps_lens.model.runners import runner_of
from dps_lens.scoring import CleanRun
from dps_lens.selection import HeadSource
from dps_lens.stats.intervals import interval, user_means
from dps_lens.steering.rules import find_rule
from dps_lens.steering.terms import combine, kl_divergence
from experiments.lib.harness import Config, Findings, Lab, above_zero, main
from experiments.lib.held_out import by_user, shown
from experiments.lib.measured import changes
from experiments.lib.output_slices import SliceRun, score_slices

TRUE, TESTED = "heads, older posts", "heads, tested posts"
OWN, OWN_TESTED = "user's heads, older post", "user's heads, tested post"
SLICES, AS_SLICES = "output slices, as heads", "output slices, as slices"


class Artefact(Config):
    k: int = 10
    n_random: int = 20
    strengths: tuple[float, ...] = (0.5, 1.0)


def measure(config: Artefact, lab: Lab) -> Findings:
    users, k = lab.users(), config.k
    labelled = dps.ScoreConfig(discovery="labelled")
    older, tested = lab.scores(users).newest(1), lab.scores(users, score_config=labelled, max_examples=1)
    prompt = config.prompt.config()
    slices = score_slices(lab.model, users, prompt_config=prompt, max_examples=1, out=lab.out / "slices")
    families: dict[str, HeadSource] = {
        TRUE: older.top(k),
        TESTED: tested.top(k),
        OWN: {user.id: older.top(k, user.id) for user in users},
        OWN_TESTED: {user.id: tested.top(k, user.id) for user in users},
        SLICES: slices.top(k),
    }
    effects = dps.ablation_curve(
        lab.model,
        users,
        families,
        ks=(k,),
        n_random=config.n_random,
        max_examples=1,
        seed=config.seed,
        out=lab.out / "ablated",
        prompt_config=prompt,
    )
    taken = {name: by_user(effects, name, k, "gain_removed") for name in families}
    cad = leaking(users, config, lab)
    differences = {
        "true heads take more than output slices": taken[TRUE] - taken[SLICES],
        "a user's heads seem better on the post that chose them": taken[OWN_TESTED] - taken[OWN],
        "all users' heads seem better on the posts that chose them": taken[TESTED] - taken[TRUE],
        "CAD is better without the leak": cad["all", config.strengths[0]][0] - cad["none", config.strengths[0]][0],
    }
    compared = pd.DataFrame([{"difference": name, **interval(values)} for name, values in differences.items()])
    ablated = shown(effects, ("gain_removed", "task_cost", "neutral_cost"))
    tables = {
        "ablated": pd.concat([ablated, as_slices(users, slices.top(k), config, lab)], ignore_index=True),
        "CAD": cad_table(cad),
        "differences": compared,
    }
    return Findings(tables, [above_zero(row["difference"], row) for row in compared.to_dict("records")])


def as_slices(users: list[User], chosen: dps.HeadSet, config: Artefact, lab: Lab) -> pd.DataFrame:
    """What removing the output slices themselves takes and costs."""
    examples, runner = [user.examples[-1] for user in users], runner_of(lab.model)

    def conditions(example: Example) -> Iterator[tuple[str, CleanRun]]:
        for profile in ("own", "none"):
            built = build_prompt(lab.model, example, profile, config=config.prompt.config())
            yield profile, SliceRun(runner, built)

    about = {"prompt": config.prompt.config().to_dict(), "data": data_digest(users, examples), "edit": "slices"}
    mask = chosen.mask(lab.model.cfg)[None]
    made = changes(lab.model, examples, conditions, lambda _: mask, about, lab.out / "as_slices")
    own, none = (made.effects[name][:, 0].numpy() for name in ("own", "none"))
    rows = [{"measure": "gain_removed", **interval(own - none)}, {"measure": "task_cost", **interval(none)}]
    return pd.DataFrame(rows).assign(family=AS_SLICES, k=config.k)


@torch.inference_mode()
def leaking(users: list[User], config: Artefact, lab: Lab) -> dict[tuple[str, float], tuple[np.ndarray, np.ndarray]]:
    """(documents that the contrast holds, strength) → change of the NLL, and KL, of each user."""
    runner, terms = runner_of(lab.model), find_rule("cad").terms
    found: dict[tuple[str, float], list[torch.Tensor]] = {}
    examples, prompt = [user.examples[-1] for user in users], config.prompt.config()
    owners = [example.user_id for example in examples]
    for example in examples:
        own = build_prompt(lab.model, example, config=prompt)
        forced = Forced(runner, own)
        full = forced.logits()
        half = config.prompt.config(items=max(1, config.prompt.items // 2))
        contrasts = {
            "none": build_prompt(lab.model, example, "none", config=prompt),
            "half": build_prompt(lab.model, example, config=half),
            "all": own,
        }
        clean = token_losses(full, forced.targets).double().mean()
        for name, contrast in contrasts.items():
            without = Forced(runner, contrast).logits()
            for strength in config.strengths:
                steered = combine(terms, full, {"negative": without}, {"negative": strength})
                change = token_losses(steered, forced.targets).double().mean() - clean
                kl = kl_divergence(steered, full).double().mean()
                found.setdefault((name, strength), []).append(torch.stack([change, kl]).cpu())
    both = {key: torch.stack(of).T for key, of in found.items()}
    return {key: (user_means(change, owners), user_means(kl, owners)) for key, (change, kl) in both.items()}


def cad_table(cad: dict[tuple[str, float], tuple[np.ndarray, np.ndarray]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"contrast holds": name, "strength": strength, **interval(change), "KL": float(kl.mean())}
            for (name, strength), (change, kl) in cad.items()
        ]
    )


if __name__ == "__main__":
    main("artefact", __doc__ or "", Artefact, measure)
