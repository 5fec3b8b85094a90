"""Users who cross style and topic: prompts that share either, both or neither, and effects of the two factors."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data import Example, PromptConfig, Shown, User, build_prompt
from dps_lens.errors import DataError
from dps_lens.model import HookedModel
from dps_lens.model.runners import runner_of
from dps_lens.scores import t_quantile
from dps_lens.scoring import CleanRun
from dps_lens.stats.intervals import user_means

SHARED = {"own": (True, True), "style": (True, False), "topic": (False, True), "neither": (False, False)}
"""Condition → whether the author of the shown profile shares style and topic with the author of the text."""

EFFECTS = {
    "style": {"own": 0.5, "style": 0.5, "topic": -0.5, "neither": -0.5},
    "topic": {"own": 0.5, "topic": 0.5, "style": -0.5, "neither": -0.5},
    "interaction": {"own": 1.0, "style": -1.0, "topic": -1.0, "neither": 1.0},
}
"""Main effects of the crossing, and what is left of own profiles: more than style and topic add up to."""


def donor(example: Example, users: Sequence[User], condition: str, seed: int) -> User:
    """A user who shares what the condition says, drawn with a seed; for `own` the author."""
    author = next(user for user in users if user.id == example.user_id)
    if condition == "own":
        return author
    style, topic = SHARED[condition]
    found = [
        user
        for user in users
        if user.id != author.id
        and (user.labels.get("style") == author.labels.get("style")) == style
        and (user.labels.get("topic") == author.labels.get("topic")) == topic
    ]
    if not found or not {"style", "topic"} <= author.labels.keys():
        raise DataError(f"user {author.id!r}: no other user shares {condition}; users need labels style and topic")
    return random.Random(f"{seed}|{example.id}|{condition}").choice(found)


def contrasts(conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Effects of style, topic and both, from a value by condition."""
    return {
        name: torch.stack([weight * conditions[condition] for condition, weight in weights.items()]).sum(0)
        for name, weights in EFFECTS.items()
    }


def conditions(
    model: HookedModel, users: Sequence[User], prompt: PromptConfig, seed: int
) -> Callable[[Example], Iterator[tuple[str, CleanRun]]]:
    """The four prompts of an example, ready for ablations."""
    runner = runner_of(model)

    def of(example: Example) -> Iterator[tuple[str, CleanRun]]:
        for name in SHARED:
            shown: Shown = "own" if name == "own" else donor(example, users, name, seed)
            yield name, CleanRun(runner, build_prompt(model, example, shown, config=prompt))

    return of


def within_cells(values: Float[Tensor, " example"], cells: Sequence[str], level: float = 0.95) -> dict[str, float]:
    """Mean of the cells' means; the cells are fixed, so that only documents within them vary.

    Student's t with the variance pooled over cells; NaN bounds where no cell holds two documents.
    """
    owners, numbers = np.array(cells), values.double().numpy()
    means, counts = user_means(values.double(), cells), [cells.count(cell) for cell in dict.fromkeys(cells)]
    freedom = len(cells) - len(counts)
    residual = sum(((numbers[owners == cell] - numbers[owners == cell].mean()) ** 2).sum() for cell in set(cells))
    error = (residual / freedom * sum(1 / n for n in counts)) ** 0.5 / len(counts) if freedom else float("nan")
    half = float(t_quantile(freedom, level) * error) if freedom else float("nan")
    return {"mean": float(means.mean()), "low": float(means.mean()) - half, "high": float(means.mean()) + half}
