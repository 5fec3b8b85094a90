"""Does contrast with Preference Heads steer towards the user, more than its rivals do at the same KL?

    python -m experiments.q10_steering [--config FILE.yaml] [--out runs/steering_kl]

Question. Does DPS make a user's own text likelier, for which K and γ, and how does it compare at matched KL with random
heads, with other heads, with CAD, DoLa, DeCoRe, StyleVector and SteerX, and stacked on CAD? Does it help to tag films
as the user does?

Hypotheses. (1) DPS with the top 10 by profile-specific PCS makes the users' own text likelier. (2) It does so more than
with random heads. (3) More than CAD. (4) Stacked on CAD it does better than CAD alone. (5) It does so more than DoLa,
DeCoRe with retrieval heads, StyleVector and SteerX, each. (6) At γ = 1 it tags more films as the user does than the
profile alone.

Measure. Newest headlines, teacher-forced; heads chosen on older documents by users of other folds. Change of the NLL
at strengths 0.03 to 4, at the strength where the mean KL(steered ‖ full) is 0.1 nats a token (also 0.02 and 0.3);
the Pareto of personalisation and fluency is this change over that KL. K of 3, 10 and 30 for DPS and amplification.
DoLa is `log p − strength · log p_j`, with no token ruled out. Vectors are of each user's 4 newest older documents, half
way up the model, added with the profile in the prompt; a user without a preference-driven token has no SteerX and a
vector of zeros. CoS contrasts the same prompts as CAD, so that at equal KL it is CAD. (6) Accuracy and macro-F1 of 12
users with three habits on held-out films (`experiments.lib.tagging`), by K and γ; heads by the others, on other films.

Control. 4 random sets of the same layers for every set of heads, at the same KL; another user's vector for a vector; in
(6) one random set a user. Greedy decoding is strength 0.

Decision rule. At KL 0.1 and K = 10, by 95% intervals over users of (1) the fall of the NLL; (2), (3), (4), (5) the
paired differences of that fall, those of (5) at 98.75%, all four of them; (6) the paired difference of accuracy.
Supported above 0, not supported below or at 0, else undecided (also where a method does not reach this KL). (5) and (6)
were stated when (1) to (4) had been measured, and before their own measurement; strengths below 0.125 were added after
it, as the weakest DoLa was stronger than the KL that is decided at.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import dps_lens as dps
from dps_lens.data import User
from dps_lens.data.examples import data_digest
from dps_lens.model import describe_model
from dps_lens.runs import RunFolder, kept
from dps_lens.vectors.steerx import NothingDrivenError
from experiments.lib.harness import Config, Findings, Lab, Prompts, above_zero, main
from experiments.lib.tables import ends
from experiments.lib.tagging import Tagging, accuracies, method, tag_users

DPS, CAD, STACKED = "dps, Preference Heads", "cad", "dps+cad, Preference Heads"
AMPLIFY, DECORE = "amplify, Preference Heads", "decore, retrieval"
VECTORS = ("stylevector", "steerx")
RIVALS = ("dola", DECORE, *VECTORS)


class Steering(Config):
    k: int = 10
    ks: tuple[int, ...] = (3, 10, 30)
    kinds: tuple[str, ...] = ("induction", "retrieval")
    strengths: tuple[float, ...] = (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    kls: tuple[float, ...] = (0.02, 0.1, 0.3)
    decided_at: float = 0.1
    n_random: int = 4
    held_out: int = 2
    vector_examples: int = 4
    films: int | None = None
    tag_ks: tuple[int, ...] = (1, 3, 10, 30)
    tag_strengths: tuple[float, ...] = (0.25, 1.0)
    tag_prompt: Prompts = Prompts(profile_tokens=256, task_tokens=200)


def measure(config: Steering, lab: Lab) -> Findings:
    users = lab.users()
    scores = lab.scores(users)
    refs = lab.references(config.kinds)
    methods: dict[str, Any] = {DPS: ("dps", scores), CAD: "cad", STACKED: ("dps+cad", scores)}
    methods |= {f"dps, {name}": ("dps", found) for name, found in refs.items()}
    methods |= {"dps-entropy, Preference Heads": ("dps-entropy", scores), AMPLIFY: ("amplify", scores), "dola": "dola"}
    if "retrieval" in refs:
        methods[DECORE] = ("decore", refs["retrieval"])
    methods |= vectors_of(users, config, lab)
    options: dict[str, Any] = {"strengths": config.strengths, "n_random": config.n_random, "seed": config.seed}
    options |= {"max_examples": config.held_out, "prompt_config": config.prompt.config()}
    sweep = dps.steering_sweep(lab.model, users, methods, k=config.k, **options, out=lab.out / "methods")
    sizes = []
    for k in config.ks:
        of_k = {DPS: ("dps", scores), AMPLIFY: ("amplify", scores)}
        found = dps.steering_sweep(lab.model, users, of_k, k=k, **options, out=lab.out / f"k{k}")
        sizes.append(found.at_kl(config.decided_at).assign(K=k))
    pairs = {"DPS less CAD": (DPS, CAD), "DPS with CAD less CAD": (STACKED, CAD)}
    against = compared(sweep, pairs | {f"{name} less another user's": (name, other(name)) for name in VECTORS}, config)
    rivals = [name for name in RIVALS if name in sweep.methods]
    each = compared(sweep, {f"DPS less {name}": (DPS, name) for name in rivals}, config, 1 - 0.05 / len(RIVALS))
    tags, tagged = tagging(config, lab)
    tables = {
        "at KL": at_kls(sweep, config.kls),
        "K": pd.concat(sizes, ignore_index=True),
        "against": against.reset_index(names="compared"),
        "against the rivals": each.reset_index(names="compared"),
        "tags": tags,
        "strengths": sweep.to_frame(),
    }
    row = sweep.at_kl(config.decided_at).set_index("method").loc[DPS]
    read = {
        "DPS makes the users' own text likelier": fall(row, "mean"),
        "DPS does so more than with random heads": fall(row, "difference"),
        "DPS does so more than CAD": fall(against.loc["DPS less CAD"], "difference"),
        "stacked on CAD it does better than CAD": fall(against.loc["DPS with CAD less CAD"], "difference"),
    }
    read |= {f"DPS does so more than {name}": fall(each.loc[f"DPS less {name}"], "difference") for name in rivals}
    read["DPS tags more films as the user does"] = tagged
    return Findings(tables, [above_zero(*one) for one in read.items()])


def vectors_of(users: Sequence[User], config: Steering, lab: Lab) -> dict[str, Any]:
    """Methods that add a vector of each user, or of the user after."""
    prompt, model = config.prompt.config(), lab.model
    settings = {"prompt": prompt.to_dict(), "examples": config.vector_examples}
    about = {"call": "vectors", "model": describe_model(model), "data": data_digest(users, []), **settings}
    folder = RunFolder(lab.out / "vectors", about)

    def make(user: User) -> dict[str, Tensor]:
        options: dict[str, Any] = {"max_examples": config.vector_examples, "prompt_config": prompt}
        try:
            steerx = dps.steerx_vector(model, user, **options).values
        except NothingDrivenError:
            steerx = torch.zeros(model.cfg.d_model)
        return {"stylevector": dps.style_vector(model, user, **options).values, "steerx": steerx}

    made = {user.id: kept(folder, user.id, partial(make, user)) for user in users}
    layer, ids = model.cfg.n_layers // 2, list(made)
    found: dict[str, Any] = {}
    for name in VECTORS:
        own = {user: dps.SteeringVector(values[name], layer) for user, values in made.items()}
        found[name] = ("vector", own)
        found[other(name)] = ("vector", {user: own[after] for user, after in zip(ids, [*ids[1:], ids[0]], strict=True)})
    return found


def other(name: str) -> str:
    return f"{name}, another user's"


def tagging(config: Steering, lab: Lab) -> tuple[pd.DataFrame, dict[str, float]]:
    """Accuracy and macro-F1 by K and strength, and the difference of accuracy that is decided by."""
    users, prompt = tag_users(config.films), config.tag_prompt.config()
    scores = lab.scores(users, "tagging", prompt_config=prompt)
    ks, strengths = sorted({*config.tag_ks, config.k}), sorted({*config.tag_strengths, 1.0})
    tagged = Tagging(lab.model, users, scores, ks, strengths, prompt, config.seed)
    table = accuracies(tagged.run(lab.out / "tags"))
    row = table.set_index(["method", "metric"]).loc[(method(f"dps, K {config.k}", 1.0), "accuracy")]
    return table, ends(row, "to rag")


def compared(
    sweep: dps.SteeringSweep, pairs: Mapping[str, tuple[str, str]], config: Steering, level: float = 0.95
) -> pd.DataFrame:
    """One method less another at equal KL: the second takes the place of the first one's random heads."""
    rows = {}
    for name, (one, two) in pairs.items():
        control = f"{one} (random)"
        change, kl = ({one: part[one], control: part[two]} for part in (sweep.change, sweep.kl))
        both = dps.SteeringSweep(sweep.strengths, sweep.user_ids, sweep.example_ids, sweep.nll, change, kl)
        rows[name] = both.at_kl(config.decided_at, level).set_index("method").loc[one]
    return pd.DataFrame(rows).T.astype({"difference": float, "difference_low": float, "difference_high": float})


def at_kls(sweep: dps.SteeringSweep, kls: Sequence[float]) -> pd.DataFrame:
    """Every method at each of these KLs."""
    return pd.concat([sweep.at_kl(kl) for kl in kls], ignore_index=True)


def fall(row: pd.Series, column: str) -> dict[str, float]:
    """A fall is a change the other way round."""
    mean, low, high = ends(row, column).values()
    return {"mean": -mean, "low": -high, "high": -low}


if __name__ == "__main__":
    main("steering_kl", __doc__ or "", Steering, measure)
