"""How much history do the heads need, and how clean must it be?

    python -m experiments.q05_samples [--config FILE.yaml] [--out runs/samples]

Question. How do the gain and what the top heads take of it depend on the number of items in the profile and on noise in
them, and how many users and examples does a stable top 10 need?

Hypotheses. (1) The gain grows with the number of the user's items. (2) What the top heads take grows with it.
(3) It falls as more of the items are another user's. (4) It falls when the words of every item are shuffled: the heads
read order, not words alone.

Measure. Newest headlines; the top 10 by profile-specific PCS, chosen on older documents by users of other folds.
`gain`: NLL without profile less NLL with this one. `gain_removed`: what ablating the heads costs with this profile less
what it costs without. Items by BM25, 32 tokens each: 1, 2, 4 or 8 of the user's; of 4, none, 2 or all another user's
(drawn with a seed); 4 with shuffled words. Slopes a doubling of items, and a user's share of items from 0 to 1, are
least squares within each user. Stability: overlap of the top 10 of disjoint samples of users, and of a user's examples.

Control. 20 random sets of the same layers, measured at every level.

Decision rule. By 95% intervals over users of the slope of the gain (1), of the slope of what is taken beyond random
sets (2), of the fall from own to foreign items (3), and of the difference between items as they are and shuffled (4).
Supported above 0, not supported below or at 0, else undecided.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

import dps_lens as dps
from dps_lens.data import Document, Example, Shown, User, build_prompt
from dps_lens.data.conditions import donors_of
from dps_lens.data.examples import data_digest
from dps_lens.data.retrieval import retrieve
from dps_lens.errors import ScoreError
from dps_lens.model.runners import runner_of
from dps_lens.scores import HeadScores
from dps_lens.scoring import CleanRun
from dps_lens.stats.intervals import interval, user_means
from experiments.lib.harness import Config, Findings, Lab, above_zero, main
from experiments.lib.measured import Changes, changes, cross_fitted, with_random

NONE, SHUFFLED = "no profile", "shuffled words"
TAKEN, RANDOM, BEYOND = "gain_removed", "gain_removed, random sets", "gain_removed, more than random sets"


class Samples(Config):
    k: int = 10
    n_random: int = 20
    held_out: int = 2
    items: tuple[int, ...] = (1, 2, 4, 8)
    mixed: int = 4
    foreign: tuple[int, ...] = (0, 2, 4)
    item_tokens: int = 32


def measure(config: Samples, lab: Lab) -> Findings:
    users = lab.users()
    scores = lab.scores(users)
    heads = cross_fitted(scores, users, config.k, config.seed)
    examples = [example for user in users for example in user.examples[-config.held_out :]]
    masks = {user: with_random(lab.model, own, config.n_random, config.seed) for user, own in heads.items()}
    runner, digest = runner_of(lab.model), data_digest(users, examples)

    def conditions(example: Example) -> Iterator[tuple[str, CleanRun]]:
        for name, (shown, profile, n) in levels(example, users, config).items():
            prompt = config.prompt.config(items=n, profile_tokens=n * config.item_tokens)
            yield name, CleanRun(runner, build_prompt(lab.model, shown, profile, config=prompt))

    about = {"config": config.model_dump(mode="json", exclude={"scores"}), "data": digest}
    found = changes(lab.model, examples, conditions, lambda e: masks[e.user_id], about, lab.out / "levels")
    owners = [example.user_id for example in examples]
    by_level = per_user(found, owners)
    tables = {
        "levels": level_table(by_level),
        "slopes": slopes(by_level, config),
        "stability": stability(scores, config),
    }
    rows = tables["slopes"].set_index(["slope", "measure"])
    read = {
        "the gain grows with the number of items": ("doubling of items", "gain"),
        "what the heads take grows with the number of items": ("doubling of items", BEYOND),
        "it falls with foreign items": ("own instead of foreign items", BEYOND),
        "it falls with shuffled words": ("words in order", BEYOND),
    }
    return Findings(tables, [above_zero(hypothesis, rows.loc[at]) for hypothesis, at in read.items()])


def levels(example: Example, users: list[User], config: Samples) -> dict[str, tuple[Example, Shown, int]]:
    """Condition → the example with the profile that is shown, whether one is shown, and how many items."""
    own = best(example, example.showable, max(*config.items, config.mixed))
    donor = donors_of(example, users, 1, config.seed)[0]
    foreign = best(example, example.showable_of(donor), config.mixed)
    found: dict[str, tuple[Example, Shown, int]] = {NONE: (example, "none", 1)}
    for n in config.items:
        found[f"{n} items"] = (replace(example, profile=own[:n]), "own", n)
    for n in config.foreign:
        mixed = own[: config.mixed - n] + foreign[:n]
        found[f"{n} of {config.mixed} foreign"] = (replace(example, profile=mixed), "own", config.mixed)
    mixed = tuple(shuffled(document, config.seed) for document in own[: config.mixed])
    found[SHUFFLED] = (replace(example, profile=mixed), "own", config.mixed)
    return found


def best(example: Example, documents: Sequence[Document], n: int) -> tuple[Document, ...]:
    return tuple(retrieve(documents, example.task.query(example.input), n, task=example.task, method="bm25", seed=0))


def shuffled(document: Document, seed: int) -> Document:
    """The document with the words of every text in a random order."""
    fields = {}
    for name, value in document.fields.items():
        words = str(value).split()
        random.Random(f"{seed}|{document.id}|{name}").shuffle(words)
        fields[name] = " ".join(words)
    return replace(document, fields=fields)


def per_user(found: Changes, owners: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Level → measure → a mean a user."""
    result = {}
    for name in found.effects:
        if name == NONE:
            continue
        taken = found.effects[name] - found.effects[NONE]
        beyond = taken[:, 0] - taken[:, 1:].mean(1)
        measures = {"gain": found.nll[NONE] - found.nll[name], TAKEN: taken[:, 0]}
        measures |= {RANDOM: taken[:, 1:].mean(1), BEYOND: beyond}
        result[name] = {measure: user_means(values, owners) for measure, values in measures.items()}
    return result


def level_table(by_level: dict[str, dict[str, np.ndarray]]) -> pd.DataFrame:
    rows = [
        {"level": level, "measure": measure, **interval(values)}
        for level, measures in by_level.items()
        for measure, values in measures.items()
    ]
    return pd.DataFrame(rows)


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of each column of `y`, `[level user]`."""
    centred = x - x.mean()
    return centred @ y / (centred @ centred)


def slopes(by_level: dict[str, dict[str, np.ndarray]], config: Samples) -> pd.DataFrame:
    """Slopes and differences of every measure, with intervals over users."""
    rows = []
    for measure in ("gain", TAKEN, BEYOND):
        counts = np.stack([by_level[f"{n} items"][measure] for n in config.items])
        mixes = np.stack([by_level[f"{n} of {config.mixed} foreign"][measure] for n in config.foreign])
        own = 1 - np.array(config.foreign) / config.mixed
        order = by_level[f"0 of {config.mixed} foreign"][measure] - by_level[SHUFFLED][measure]
        for name, values in (
            ("doubling of items", slope(np.log2(config.items), counts)),
            ("own instead of foreign items", slope(own, mixes)),
            ("words in order", order),
        ):
            rows.append({"slope": name, "measure": measure, **interval(values)})
    return pd.DataFrame(rows)


def stability(scores: HeadScores, config: Samples) -> pd.DataFrame:
    """Overlap of the top K of disjoint samples, by users, and by examples of one user (mean over users)."""
    tables = [dps.stability(scores, k=config.k, seed=config.seed).assign(units_are="users")]
    own = []
    for user in scores.users:
        try:
            own.append(dps.stability(scores, k=config.k, user=user, seed=config.seed))
        except ScoreError:
            continue  # a user with a single example
    if own:
        mean = pd.concat(own).groupby("units", as_index=False)[["jaccard", "low", "high", "spearman", "chance"]].mean()
        tables.append(mean.assign(units_are="examples of a user"))
    columns = ["units_are", "units", "jaccard", "low", "high", "spearman", "chance"]
    found = pd.concat(tables, ignore_index=True)[columns]
    return found.rename(columns={"low": "jaccard_low", "high": "jaccard_high"})


if __name__ == "__main__":
    main("samples", __doc__ or "", Samples, measure)
