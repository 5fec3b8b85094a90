"""Where do heads act, on the profile or on the answer, and does it last over length and turns?

    python -m experiments.q06_positions [--config FILE.yaml] [--out runs/positions]

Question. Do Preference Heads work where the answer is written (reading) or at the profile's tokens (writing)? Does what
they carry depend on the length of the profile, and does it reach later turns of a dialogue?

Hypotheses. (1) Heads found at the response positions act there: ablated there they take more of the gain than ablated
at the profile. (2) Other heads write: the top 10 by first-order estimate at the profile's positions take more than
random sets when ablated there. (3) The gain grows with the length of the profile, to 1,024 tokens. (4) With a profile
in the first turn only, there is a gain in the last turn. (5) The heads take some of it there.

Measure. Newest headline of 10 users; heads chosen on older documents by users of other folds. `gain_removed`: cost of
ablating with the own profile less the cost without. Sides: edits at the response, the profile or all positions. Length:
8 items by BM25 in 64 to 1,024 tokens; slope a doubling by least squares within each user. Dialogue: 3 headlines of a
user as three turns, edits at every turn of the assistant.

Control. 4 random sets of the same layers for every set and condition; the difference averages them within each user.

Decision rule. By 95% intervals over users: (1) of the paired difference, response − profile; (2) of taken at the
profile beyond random sets; (3) of the slope of the gain; (4) of the gain in the last turn; (5) of what is taken there
beyond random sets. Supported above 0, not supported below or at 0, else undecided.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import dps_lens as dps
from dps_lens import literals
from dps_lens.data import Example, User, build_prompt
from dps_lens.data.examples import data_digest
from dps_lens.model import describe_model
from dps_lens.model.runners import runner_of
from dps_lens.runs import RunFolder, kept
from dps_lens.scoring import CleanRun
from dps_lens.stats.intervals import interval
from experiments.lib.dialogue import dialogue, turn_losses
from experiments.lib.harness import Config, Findings, Lab, above_zero, main
from experiments.lib.measured import changes, cross_fitted, with_random
from experiments.q05_samples import BEYOND, RANDOM, TAKEN, slope

READ, WRITE = "reading heads", "writing heads"
SIDES: tuple[literals.Positions, ...] = ("response", "profile", "all")


class Positions(Config):
    k: int = 10
    n_random: int = 4
    tested_users: int = 10
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    long_items: int = 8
    turns: int = 3


def measure(config: Positions, lab: Lab) -> Findings:
    users = lab.users()
    scores = lab.scores(users)
    estimated = lab.scores(users, max_examples=1, positions="profile", method="attribution")
    tested = [user for user in users if len(user.examples) >= config.turns][: config.tested_users]
    reading, writing = (cross_fitted(found, users, config.k, config.seed) for found in (scores, estimated))
    masks = {
        user.id: torch.cat(
            [with_random(lab.model, heads[user.id], config.n_random, config.seed) for heads in (reading, writing)]
        )
        for user in tested
    }
    pair = dps.overlap({READ: scores, WRITE: estimated}, k=config.k, seed=config.seed).to_frame()
    sided = sides(tested, masks, config, lab)
    long, slopes = lengths(tested, masks, config, lab)
    talks = talk_table(tested, masks, config, lab)
    tables = {
        "overlap": pair,
        "sides": table_of(sided),
        "lengths": table_of(long),
        "slopes": slopes,
        "turns": table_of(talks),
    }
    last = f"turn {config.turns}"
    read = {
        "reading heads act at the response": interval(sided[READ, "response", TAKEN] - sided[READ, "profile", TAKEN]),
        "writing heads act at the profile": interval(sided[WRITE, "profile", BEYOND]),
        "the gain grows with the length of the profile": slopes.iloc[0],
        "the gain lasts to the last turn": interval(talks["full model", last, "gain"]),
        "the heads take some of it there": interval(talks[READ, last, BEYOND]),
    }
    return Findings(tables, [above_zero(*one) for one in read.items()])


Found = dict[tuple[str, str, str], np.ndarray]
"""(heads, condition, measure) → a value a user."""


def table_of(found: Found) -> pd.DataFrame:
    names = ("heads", "condition", "measure")
    return pd.DataFrame([{**dict(zip(names, key, strict=True)), **interval(values)} for key, values in found.items()])


def measures(own: Tensor, none: Tensor, condition: str, config: Positions) -> Found:
    """What both families take, from costs `[user row]` with and without the profile."""
    found: Found = {}
    width = config.n_random + 1
    for index, name in enumerate((READ, WRITE)):
        rows = (own - none)[:, index * width : (index + 1) * width]
        chosen, random = rows[:, 0], rows[:, 1:].mean(1)
        for measure, values in ((TAKEN, chosen), (RANDOM, random), (BEYOND, chosen - random)):
            found[name, condition, measure] = values.double().numpy()
    return found


def about(examples: list[Example], users: list[User], config: Positions) -> dict[str, object]:
    return {"config": config.model_dump(mode="json", exclude={"scores"}), "data": data_digest(users, examples)}


def sides(users: list[User], masks: Mapping[str, Tensor], config: Positions, lab: Lab) -> Found:
    """Gains taken by edits at the response, the profile, and everywhere."""
    examples, runner, prompt = [user.examples[-1] for user in users], runner_of(lab.model), config.prompt.config()

    def conditions(example: Example) -> Iterator[tuple[str, CleanRun]]:
        for profile in ("own", "none"):
            built = build_prompt(lab.model, example, profile, config=prompt)
            for side in SIDES:
                yield f"{profile}, {side}", CleanRun(runner, built, positions=side)

    made = changes(
        lab.model, examples, conditions, lambda e: masks[e.user_id], about(examples, users, config), lab.out / "sides"
    )
    found: Found = {}
    for side in SIDES:
        found |= measures(made.effects[f"own, {side}"], made.effects[f"none, {side}"], side, config)
    return found


def lengths(users: list[User], masks: Mapping[str, Tensor], config: Positions, lab: Lab) -> tuple[Found, pd.DataFrame]:
    """Gain and what is taken of it for profiles of growing length, and their slopes a doubling."""
    examples, runner = [user.examples[-1] for user in users], runner_of(lab.model)

    def conditions(example: Example) -> Iterator[tuple[str, CleanRun]]:
        for tokens in config.lengths:
            prompt = config.prompt.config(items=config.long_items, profile_tokens=tokens)
            yield str(tokens), CleanRun(runner, build_prompt(lab.model, example, config=prompt))
        prompt = config.prompt.config()
        yield "none", CleanRun(runner, build_prompt(lab.model, example, "none", config=prompt))

    made = changes(
        lab.model, examples, conditions, lambda e: masks[e.user_id], about(examples, users, config), lab.out / "lengths"
    )
    found: Found = {}
    for tokens in map(str, config.lengths):
        found["full model", tokens, "gain"] = (made.nll["none"] - made.nll[tokens]).numpy()
        found |= measures(made.effects[tokens], made.effects["none"], tokens, config)
    rows, doublings = [], np.log2(config.lengths)
    for heads, measure in (("full model", "gain"), (READ, TAKEN), (READ, BEYOND)):
        values = slope(doublings, np.stack([found[heads, str(tokens), measure] for tokens in config.lengths]))
        rows.append({"heads": heads, "measure": f"{measure}, a doubling of the length", **interval(values)})
    return found, pd.DataFrame(rows)


def talk_table(users: list[User], masks: Mapping[str, Tensor], config: Positions, lab: Lab) -> Found:
    """Gain and what is taken of it in every turn."""
    examples = [user.examples[-config.turns] for user in users]
    settings = about(examples, users, config) | {"model": describe_model(lab.model)}
    settings["heads"] = {user: mask.nonzero().tolist() for user, mask in masks.items()}
    folder, units = RunFolder(lab.out / "turns", settings), []

    def unit(user: User) -> dict[str, Tensor]:
        found = {}
        rows = torch.cat([torch.zeros_like(masks[user.id][:1]), masks[user.id]])
        for name, shown in (("own", True), ("none", False)):
            talk = dialogue(lab.model, user.examples[-config.turns :], shown, config.prompt.config())
            found[name] = turn_losses(lab.model, talk, rows)
        return found

    for user in users:
        units.append(kept(folder, user.id, partial(unit, user)))
    own, none = (torch.stack([unit[name] for unit in units]) for name in ("own", "none"))
    found: Found = {}
    for turn in range(config.turns):
        name = f"turn {turn + 1}"
        found["full model", name, "gain"] = (none[:, turn, 0] - own[:, turn, 0]).numpy()
        cost, without = (losses[:, turn, 1:] - losses[:, turn, :1] for losses in (own, none))
        found |= measures(cost, without, name, config)
    return found


if __name__ == "__main__":
    main("positions", __doc__ or "", Positions, measure)
