"""Measure chosen heads again where they were not chosen, and the noise of a number format."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from dps_lens.analysis.ablation import check_held_out
from dps_lens.analysis.intervals import interval, user_means
from dps_lens.data import PromptConfig, User
from dps_lens.errors import ScoreError
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.scores import HeadScores, NoiseFloor
from dps_lens.scoring import score_heads
from dps_lens.scoring.sweep import Sweep

if TYPE_CHECKING:
    import pandas

_SETTINGS = ("contrast", "ablation", "positions", "discovery", "max_examples", "seed")
_OPTIONAL = {"patch_from": "no_profile", "direction": "noising", "n_donors": 3}


def settings_of(scores: HeadScores) -> dict[str, Any]:
    """Arguments of `score_heads` that make scores like these.

    Raises:
        ScoreError: the scores do not come from `score_heads`.
    """
    manifest = scores.manifest
    missing = [name for name in (*_SETTINGS, "prompt") if name not in manifest]
    if missing:
        raise ScoreError(f"these scores do not come from score_heads: their manifest lacks {', '.join(missing)}")
    settings = {name: manifest[name] for name in _SETTINGS}
    settings |= {name: manifest.get(name, default) for name, default in _OPTIONAL.items()} | {"batch_size": "auto"}
    return settings | {"prompt": PromptConfig(**manifest["prompt"])}


def held_out_effects(
    model: HookedModel, users: Sequence[User], scores: HeadScores, *, k: int = 10, progress: bool = True
) -> "pandas.DataFrame":
    """Scores of the top heads on the evaluation examples of users, beside those they were chosen for.

    Heads are chosen for being large, so their discovery scores are too large on average (winner's
    curse); the held-out scores are not.

    Args:
        model: the model of the scores.
        users: the users of the scores; their evaluation examples are used, with the same settings.
        scores: of `score_heads`.
        k: how many heads.
        progress: show a progress bar.

    Returns:
        one row a head: `name`, `discovery`, `held_out` with `low` and `high` (Student's t over users).

    Raises:
        ScoreError: an evaluation example is among those the scores were measured on.
    """
    import pandas as pd

    examples = [example for user in users for example in user.examples]
    check_held_out("held_out_effects", scores, examples)
    heads: HeadSet = scores.top(k)
    sweep = Sweep(model, list(users), method="exact", exact_layers=0, confirm=0.0, **settings_of(scores))
    sweep = sweep.with_means(None, progress)
    chosen, rows = heads.mask(model.cfg), []
    for example in tqdm(examples, desc="held-out effects", unit="example", disable=None if progress else True):
        rows.append(sum(term.weight * term.exact(chosen) for term in sweep.terms(example)))
    values = torch.stack(rows)  # type: ignore[arg-type]
    owners = [example.user_id for example in examples]
    mean, found = scores.mean(), []
    for head in heads:
        held_out = interval(user_means(values[:, head.layer, head.head].double(), owners), 0.95)
        found.append(
            {
                "name": str(head),
                "discovery": float(mean[head]),
                "held_out": held_out["mean"],
                "low": held_out["low"],
                "high": held_out["high"],
            }
        )
    return pd.DataFrame(found)


def measure_noise(
    scores: HeadScores, model: HookedModel, reference: HookedModel, users: Sequence[User], *, n_examples: int = 4
) -> NoiseFloor:
    """What the model's number format alone does to a score, and note it in `scores`.

    Args:
        scores: of `model`; `scores.noise_floor` is set.
        model: in the number format of the scores, such as bfloat16.
        reference: the same weights in float32.
        users: the sample is one discovery example of each of the first `n_examples`.
        n_examples: size of the sample.
    """
    settings = settings_of(scores) | {"max_examples": 1, "progress": False}
    sample = list(users[:n_examples])
    low, high = (score_heads(each, sample, **settings) for each in (model, reference))
    difference = (low.values - high.values).double()
    floor = NoiseFloor(sd=float(difference.std()), bias=float(difference.mean()), n_examples=len(low.values))
    scores.manifest["noise_floor"] = floor._asdict()
    return floor
