"""How much of a published effect can three choices of a detector make?

    python -m experiments.exp_artefact [--config FILE.yaml] [--out runs/artefact]

Question. Published detectors zero slices of the output of `o_proj` and call them heads; heads are scored on the items
that are evaluated; and the contrast of CAD, meant to be without context, can still hold it. What does each change?

Hypotheses. (1) The heads that output slices name take less of the gain than true heads chosen on the same posts.
(2) A user's own heads seem to take more of the gain when they were chosen on the tested post. (3) So do heads chosen by
all users. (4) CAD makes the users' text likelier than CAD with a leaking context, which is greedy decoding.

Measure. The newest headline of every user. Top 10 by profile-specific PCS, scored on one older post a user, or on the
tested post itself; ranked by all users, or by each user alone; and the top 10 output slices, ablated as the heads of
that name and as the slices that they are. `taken` and `harm` as in exp_causality. CAD, teacher-forced, at strengths 0.5
and 1: change of the NLL of the user's headline when the contrast holds no document, half of them, or all.

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
from dps_lens.analysis.forced import Forced, combine
from dps_lens.analysis.intervals import interval, user_means
from dps_lens.data import Example, User, build_prompt
from dps_lens.model import Runner
from dps_lens.scoring import Branches
from dps_lens.scoring.branches import token_losses
from dps_lens.scoring.sweep import data_digest
from dps_lens.steering.rules import divergence, find_rule
from experiments.held_out import by_user, shown
from experiments.measured import changes
from experiments.output_slices import SliceBranches, score_slices
from experiments.setup import Claim, Config, Findings, Lab, decide, main

TRUE, TESTED = "heads, older posts", "heads, tested posts"
OWN, OWN_TESTED = "user's heads, older post", "user's heads, tested post"
SLICES, AS_SLICES = "output slices, as heads", "output slices, as slices"


class Artefact(Config):
    k: int = 10
    n_random: int = 20
    strengths: tuple[float, ...] = (0.5, 1.0)


def measure(config: Artefact, lab: Lab) -> Findings:
    users, k = lab.users(), config.k
    older, tested = lab.scores(users).newest(1), lab.scores(users, discovery="labelled", max_examples=1)
    prompt = config.prompt.config()
    slices = score_slices(lab.model, users, prompt=prompt, max_examples=1, out=lab.out / "slices")
    families = {
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
        prompt=prompt,
        seed=config.seed,
        out=lab.out / "ablated",
    )
    taken = {name: by_user(effects, name, k, "taken") for name in families}
    cad = leaking(users, config, lab)
    differences = {
        "true heads take more than output slices": taken[TRUE] - taken[SLICES],
        "a user's heads seem better on the post that chose them": taken[OWN_TESTED] - taken[OWN],
        "all users' heads seem better on the posts that chose them": taken[TESTED] - taken[TRUE],
        "CAD is better without the leak": cad["all", config.strengths[0]][0] - cad["none", config.strengths[0]][0],
    }
    compared = pd.DataFrame([{"difference": name, **interval(values)} for name, values in differences.items()])
    ablated = shown(effects, ("taken", "harm", "neutral"))
    tables = {
        "ablated": pd.concat([ablated, as_slices(users, slices.top(k), config, lab)], ignore_index=True),
        "CAD": cad_table(cad),
        "differences": compared,
    }
    claims = [
        Claim(row["difference"], "the interval lies above 0", row, decide(row["low"], row["high"]))
        for row in compared.to_dict("records")
    ]
    return Findings(tables, claims)


def as_slices(users: list[User], chosen: dps.HeadSet, config: Artefact, lab: Lab) -> pd.DataFrame:
    """What removing the output slices themselves takes and costs."""
    examples, runner = [user.examples[-1] for user in users], Runner.of(lab.model)

    def conditions(example: Example) -> Iterator[tuple[str, Branches]]:
        for profile in ("own", "none"):
            built = build_prompt(lab.model, example, profile, config=config.prompt.config())
            yield profile, SliceBranches(runner, built)

    about = {"prompt": config.prompt.config().to_dict(), "data": data_digest(users, examples), "edit": "slices"}
    mask = chosen.mask(lab.model.cfg)[None]
    made = changes(lab.model, examples, conditions, lambda _: mask, about, lab.out / "as_slices")
    own, none = (made.effects[name][:, 0].numpy() for name in ("own", "none"))
    rows = [{"measure": "taken", **interval(own - none)}, {"measure": "harm", **interval(none)}]
    return pd.DataFrame(rows).assign(family=AS_SLICES, k=config.k)


@torch.inference_mode()
def leaking(users: list[User], config: Artefact, lab: Lab) -> dict[tuple[str, float], tuple[np.ndarray, np.ndarray]]:
    """(documents that the contrast holds, strength) → change of the NLL, and KL, of each user."""
    runner, rule, found = Runner.of(lab.model), find_rule("cad"), {}
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
                steered = combine(rule, strength, full, without=without)
                change = token_losses(steered, forced.targets).double().mean() - clean
                kl = divergence(steered, full).double().mean()
                found.setdefault((name, strength), []).append((change.cpu(), kl.cpu()))
    return {
        key: tuple(user_means(torch.stack(part), owners) for part in zip(*values, strict=True))
        for key, values in found.items()
    }


def cad_table(cad: dict[tuple[str, float], tuple[np.ndarray, np.ndarray]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"contrast holds": name, "strength": strength, **interval(change), "KL": float(kl.mean())}
            for (name, strength), (change, kl) in cad.items()
        ]
    )


if __name__ == "__main__":
    main("artefact", __doc__ or "", Artefact, measure)
