"""Measure chosen heads again where they were not chosen, and the noise of a number format."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dps_lens.data import User
from dps_lens.data.examples import held_out_examples
from dps_lens.model import HookedModel
from dps_lens.progress import progress_bar
from dps_lens.scores import HeadScores, NoiseFloor
from dps_lens.scoring import score_heads
from dps_lens.scoring.sweep import Sweep
from dps_lens.selection import check_held_out, score_settings
from dps_lens.stats.intervals import interval, user_means
from dps_lens.work import Run, RunConfig

if TYPE_CHECKING:
    import pandas


def held_out_effects(
    model: HookedModel,
    users: Sequence[User],
    scores: HeadScores,
    *,
    k: int = 10,
    run_config: RunConfig | None = None,
) -> "pandas.DataFrame":
    """Scores of the top heads on the evaluation examples of users, beside those they were chosen for.

    Heads are chosen for being large, so their discovery scores are too large on average (winner's
    curse); the held-out scores are not.

    Args:
        model: the model of the scores.
        users: the users of the scores; their evaluation examples are used, with the same settings.
        scores: of `score_heads`.
        k: how many heads.
        run_config: rows of a batch, progress bars.

    Returns:
        one row a head: `name`, `discovery`, `held_out` with `low` and `high` (Student's t over users).

    Raises:
        ScoreError: an evaluation example is among those the scores were measured on.
    """
    import pandas as pd

    examples = held_out_examples("held_out_effects", users, None)
    check_held_out("held_out_effects", scores, examples)
    heads, run, settings = scores.top(k), Run(model, HeadScores, config=run_config), score_settings(scores)
    config = settings.pop("score_config")
    sweep = Sweep(model, list(users), config=config, batch_size=run.config.batch_size, **settings).with_means(run)
    chosen, rows = heads.mask(model.cfg), []
    for example in progress_bar(examples, desc="held-out effects", unit="example", shown=run.config.progress):
        parts, _ = sweep.parts(example)
        effects, _ = sweep.effects(parts, chosen)
        rows.append(sum((p.weight * effect for p, effect in zip(parts, effects, strict=True)), torch.zeros(())))
    values = torch.stack(rows)
    owners = [example.user_id for example in examples]
    mean, table = scores.mean(), []
    for head in heads:
        held_out = interval(user_means(values[:, head.layer, head.head].double(), owners), 0.95)
        row = {"name": str(head), "discovery": float(mean[head]), "held_out": held_out.pop("mean")}
        table.append(row | held_out)
    return pd.DataFrame(table)


def measure_noise(
    scores: HeadScores, model: HookedModel, reference: HookedModel, users: Sequence[User], *, n_examples: int = 4
) -> NoiseFloor:
    """What the model's number format alone does to a score, and note it in `scores`.

    Args:
        scores: of `model`; `scores.noise_floor` is set.
        model: in the number format of the scores, such as bfloat16.
        reference: the same weights in float32.
        users: the sample is one discovery example of each of the first `n_examples`, and of two at least where
            scores are against another user.
        n_examples: size of the sample.
    """
    settings = score_settings(scores) | {"max_examples": 1, "run_config": RunConfig(progress=False)}
    crossed = settings["against"] not in (None, "no_profile")
    sample = list(users[: max(n_examples, 2) if crossed else n_examples])
    low, high = (score_heads(each, sample, **settings) for each in (model, reference))
    difference = (low.values - high.values).double()
    floor = NoiseFloor(sd=float(difference.std()), bias=float(difference.mean()), n_examples=len(low.values))
    scores.manifest["noise_floor"] = floor._asdict()
    return floor
