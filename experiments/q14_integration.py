"""How many steps, donors and examples do integrated scores need?

    python -m experiments.q14_integration [--config FILE.yaml] [--out runs/integration]

Question. Which settings of `score_heads(method="integrated")`, patched towards other users, give a ranking that other
users of the same kind would give again, and what do they cost?

Hypotheses. (1) Five nodes of the path integral rank as twenty do. (2) One node, the middle
of the path, does not. (3) A second donor makes halves of the users agree more. (4) So does a second example.

Measure. The newest discovery examples of every user, each patched towards `n_donors` other users, at 1, 2, 5, 10 and 20
nodes of a Gauss–Legendre rule. Top K heads by the mean over users. Accuracy of a setting: Jaccard overlap of its top K
and of that of 20 nodes, same donors and examples; the completeness gap, |sum of scores − change of NLL| over |change|,
median over patches. Agreement: Jaccard of the top K of two random halves of the users, mean over 100 halvings; its
interval leaves out a quarter of the users at a time. Cost: rows of forward and backward passes over the response, and
prompts that are run, an example.

Control. Agreement by chance, K / (2N − K) of N heads, stands beside. The same halvings serve all settings.

Decision rule. (1) supported if the overlap of 5 and 20 nodes has an interval above 0.8 at K = 10; (2) supported if that
of 1 and 20 nodes has an interval below 0.8; (3), (4) supported if the interval of the difference of agreements lies
above 0, not supported if it lies below, else undecided. The default is the cheapest setting that is within 0.05 of the
best agreement at K = 10. Four hypotheses, each reported; no further correction.

Amended after the first run: the rule chose one node, whose scores miss a third of the change that they should add up to
(median). The default is the cheapest setting by the same rule among those with a median gap of at most 1%.
"""

from functools import partial
from itertools import product

import pandas as pd
import torch
from torch import Tensor

import dps_lens as dps
from dps_lens.data import Example, User
from dps_lens.data.conditions import prompts_in
from dps_lens.data.examples import newest, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.model import runner_of
from dps_lens.progress import progress_bar
from dps_lens.runs import RunFolder, kept
from dps_lens.scoring import CleanRun
from dps_lens.scoring.paths import integrated
from experiments.lib.halves import Maps, halves, leaving_quarters, top, without
from experiments.lib.harness import Claim, Config, Findings, Lab, Outcome, decide, main

STEPS = (1, 2, 5, 10, 20)
FINEST, ENOUGH = 20, 0.8


class Integration(Config):
    max_examples: int = 2
    n_donors: int = 3
    ks: tuple[int, ...] = (10, 20)
    n_splits: int = 50
    n_subsets: int = 100


def measure(config: Integration, lab: Lab) -> Findings:
    users = [user for user in lab.users() if len(user.discovery_examples()) >= config.max_examples]
    scores, change = paths(users, config, lab)
    rows, maps = [], {}
    for steps, donors, examples in product(STEPS, range(1, config.n_donors + 1), range(1, config.max_examples + 1)):
        maps[steps, donors, examples] = users_maps(scores, steps, donors, examples)
        for k in config.ks:
            rows.append(
                {"steps": steps, "donors": donors, "examples": examples, "K": k}
                | {"prompts": examples * (1 + donors), "rows": examples * donors * steps}
                | accuracy(maps[steps, donors, examples], users_maps(scores, FINEST, donors, examples), k, config)
                | agreement(maps[steps, donors, examples], k, config)
            )
    frame = pd.DataFrame(rows)
    n_heads = scores.shape[-1]
    chance = pd.DataFrame([{"K": k, "by chance": k / (2 * n_heads - k)} for k in config.ks])
    claims = [ranks_as_finest(frame, 5, config), ranks_otherwise(frame, 1, config)]
    k, most = config.ks[0], (config.n_donors, config.max_examples)
    claims.append(more("a second donor", maps[5, 2, most[1]], maps[5, 1, most[1]], k, config))
    claims.append(more("a second example", maps[5, most[0], 2], maps[5, most[0], 1], k, config))
    return Findings({"settings": frame, "completeness": gaps(scores, change), "chance": chance}, claims)


def paths(users: list[User], config: Integration, lab: Lab) -> tuple[Tensor, Tensor]:
    """Scores `[user example donor steps head]`, newest example first, and the change of NLL `[user example donor]`."""
    examples = [example for user in users for example in newest(user.discovery_examples(), config.max_examples)]
    prompt = config.prompt.config()
    about = {"n_donors": config.n_donors, "steps": STEPS, "seed": config.seed}
    folder = RunFolder(lab.out / "paths", about | describe_inputs(lab.model, users, examples, prompt))
    runner, units = runner_of(lab.model), []

    def unit(example: Example) -> dict[str, Tensor]:
        own = CleanRun(runner, prompts_in(lab.model, example, "own", users, config=prompt)[0])
        donors = prompts_in(
            lab.model, example, "other_user", users, n_donors=config.n_donors, seed=config.seed, config=prompt
        )
        found, change = [], []
        for donor in donors:
            other = CleanRun(runner, donor, keep_z=True)
            patched = own.with_values(dps.Patch(z=other.z))
            along = [integrated(patched, steps) for steps in STEPS]
            found.append(torch.stack([path.values.flatten() for path in along]))
            change.append(along[-1].change)
        return {"scores": torch.stack(found), "change": torch.tensor(change, dtype=torch.float64)}

    for example in progress_bar(examples, desc="paths", unit="example"):
        units.append(kept(folder, unit_key(example), partial(unit, example)))
    size = (len(users), config.max_examples)
    scores, change = (torch.stack([one[name] for one in units]).unflatten(0, size) for name in ("scores", "change"))
    return scores.flip(1), change.flip(1)


def users_maps(scores: Tensor, steps: int, donors: int, examples: int) -> Maps:
    """A map a user, of the newest examples and the first donors."""
    return scores[:, :examples, :donors, STEPS.index(steps)].double().mean((1, 2)).numpy()


def jaccard(one: Maps, other: Maps, k: int) -> float:
    a, b = (set(top(maps.mean(0), k).tolist()) for maps in (one, other))
    return len(a & b) / len(a | b)


def accuracy(maps: Maps, finest: Maps, k: int, config: Integration) -> dict[str, float]:
    found = leaving_quarters(
        lambda stay: jaccard(maps[stay], finest[stay], k), len(maps), config.n_subsets, config.seed
    )
    return {"as finest": found["mean"], "as finest_low": found["low"], "as finest_high": found["high"]}


def halved(maps: Maps, k: int, stay: list[int], config: Integration) -> float:
    """Mean overlap of the top K of two halves of those users who stay."""
    splits = without(halves(len(maps), config.n_splits, config.seed), stay)
    return sum(jaccard(maps[one], maps[two], k) for one, two in splits if one and two) / len(splits)


def agreement(maps: Maps, k: int, config: Integration) -> dict[str, float]:
    found = leaving_quarters(lambda stay: halved(maps, k, stay, config), len(maps), config.n_subsets, config.seed)
    return {"of halves": found["mean"], "of halves_low": found["low"], "of halves_high": found["high"]}


def gaps(scores: Tensor, change: Tensor) -> pd.DataFrame:
    missed = (scores.double().sum(-1) - change[..., None]).abs() / change.abs()[..., None]
    return pd.DataFrame({"steps": STEPS, "median gap": missed.flatten(0, 2).median(0).values.tolist()})


def row_of(frame: pd.DataFrame, steps: int, config: Integration) -> pd.Series:
    at = (frame["steps"] == steps) & (frame["donors"] == config.n_donors) & (frame["examples"] == config.max_examples)
    return frame[at & (frame["K"] == config.ks[0])].iloc[0]


def ranks_as_finest(frame: pd.DataFrame, steps: int, config: Integration) -> Claim:
    row = row_of(frame, steps, config)
    measured = {name: float(row[f"as finest{end}"]) for name, end in (("mean", ""), ("low", "_low"), ("high", "_high"))}
    outcome = decide(measured["low"], measured["high"], ENOUGH)
    return Claim(f"{steps} nodes rank as {FINEST} do", f"the interval lies above {ENOUGH}", measured, outcome)


def ranks_otherwise(frame: pd.DataFrame, steps: int, config: Integration) -> Claim:
    row = row_of(frame, steps, config)
    measured = {name: float(row[f"as finest{end}"]) for name, end in (("mean", ""), ("low", "_low"), ("high", "_high"))}
    outcome: Outcome = "supported" if measured["high"] < ENOUGH else "undecided"
    if measured["low"] >= ENOUGH:
        outcome = "not supported"
    return Claim(f"{steps} node ranks otherwise", f"the interval lies below {ENOUGH}", measured, outcome)


def more(what: str, one: Maps, other: Maps, k: int, config: Integration) -> Claim:
    def difference(stay: list[int]) -> float:
        return halved(one, k, stay, config) - halved(other, k, stay, config)

    n, rng = len(one), config.seed
    value = difference(list(range(n)))
    shifted = leaving_quarters(lambda stay: (difference(stay) + 1) / 2, n, config.n_subsets, rng)
    measured = {"mean": value, "low": 2 * shifted["low"] - 1, "high": 2 * shifted["high"] - 1}
    outcome = decide(measured["low"], measured["high"])
    return Claim(f"{what} makes halves agree more", "the interval of the difference lies above 0", measured, outcome)


if __name__ == "__main__":
    main("integration", __doc__ or "", Integration, measure)
