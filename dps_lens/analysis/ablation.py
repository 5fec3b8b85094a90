"""What ablating chosen heads costs on held-out examples, against layer-matched random heads."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.analysis.intervals import interval, user_means
from dps_lens.data import Example, PromptConfig, User, build_prompt
from dps_lens.errors import ScoreError
from dps_lens.families import draw_seed, random_heads
from dps_lens.heads import HeadSet
from dps_lens.intervene import Ablation, Positions
from dps_lens.model import HookedModel, Runner
from dps_lens.scores import HeadScores
from dps_lens.scoring.branches import BatchSize, Branches

if TYPE_CHECKING:
    import pandas

OWN, NONE = "own", "no_profile"


@dataclass(frozen=True)
class AblationCost:
    """NLL of held-out responses with nothing, chosen heads, or random heads ablated.

    Attributes:
        nll: `Float64[Tensor, "set example"]` by condition (`"own"`, `"no_profile"`); the first row is the
            unablated model, the second the chosen heads, the rest the random draws.
        user_ids: owner of each example.
        heads: the chosen heads.
        draws: the random sets.
        manifest: settings.
    """

    nll: dict[str, Float64[Tensor, "set example"]]
    user_ids: tuple[str, ...]
    heads: HeadSet
    draws: tuple[HeadSet, ...]
    manifest: dict[str, Any] = field(default_factory=dict)

    def to_frame(self, level: float = 0.95) -> "pandas.DataFrame":
        """One row a measure: mean over users with a Student's t interval over users.

        `gain` is NLL(no profile) − NLL(own profile). `taken` is the gain of the full model minus the gain
        under ablation: what the heads carry of the personalisation. `harm` is what the ablation costs
        without a profile. Random rows average the draws within each user.
        """
        import pandas as pd

        own, none = self.nll[OWN], self.nll[NONE]
        gain = none - own
        chosen, draws = gain[1], gain[2:].mean(0)
        label = f"top {len(self.heads)} heads"
        random_label = f"{len(self.draws)} random sets"
        rows: list[tuple[str, str, Tensor]] = [
            ("full model", "NLL, own profile", own[0]),
            ("full model", "NLL, no profile", none[0]),
            ("full model", "gain", gain[0]),
            (label, "gain", chosen),
            (label, "taken", gain[0] - chosen),
            (label, "harm", none[1] - none[0]),
        ]
        if self.draws:
            rows += [
                (random_label, "gain", draws),
                (random_label, "taken", gain[0] - draws),
                (random_label, "harm", none[2:].mean(0) - none[0]),
                ("difference", "taken", draws - chosen),
                ("difference", "harm", none[1] - none[2:].mean(0)),
            ]
        return pd.DataFrame(
            [
                {"ablated": ablated, "measure": measure, **interval(user_means(v, self.user_ids), level)}
                for ablated, measure, v in rows
            ]
        )

    def verdict(self) -> str:
        """The sentences that the held-out numbers support."""
        frame = self.to_frame()
        rows = {(row["ablated"], row["measure"]): row for row in frame.to_dict("records")}
        gain, k = rows["full model", "gain"], len(self.heads)
        if math.isnan(gain["low"]):
            return "One user gives no interval over users, so nothing is claimed."
        if not gain["low"] > 0:
            return f"Here the profile does not reliably help the model (gain {_words(gain)}); there is little to take."
        if not self.draws:
            return (
                f"The profile helps the model (gain {_words(gain)}); without random heads nothing is claimed of these."
            )
        taken, harm = rows["difference", "taken"], rows["difference", "harm"]
        if taken["low"] > 0:
            first = f"The top {k} heads take more of the gain than random heads of the same layers, by {_words(taken)}."
        elif taken["high"] < 0:
            first = f"The top {k} heads take less of the gain than random heads of the same layers ({_words(taken)})."
        else:
            first = f"The top {k} heads cannot be told from random heads of the same layers ({_words(taken)})."
        if harm["low"] > 0:
            return (
                f"{first} They also harm the model where there is no profile, more than random heads do "
                f"({_words(harm)})."
            )
        return f"{first} Where there is no profile they harm the model no more than random heads ({_words(harm)})."

    @property
    def share_of_draws_below(self) -> float:
        """Share of random sets that take less of the gain than the chosen heads."""
        taken = (self.nll[NONE] - self.nll[OWN])[0] - (self.nll[NONE] - self.nll[OWN])
        per_set = np.array([user_means(row, self.user_ids).mean() for row in taken[1:]])
        return float((per_set[1:] < per_set[0]).mean()) if len(per_set) > 1 else float("nan")


def _layers(heads: HeadSet) -> list[int]:
    return sorted(head.layer for head in heads)


def check_held_out(call: str, scores: HeadScores, examples: Sequence[Example]) -> None:
    """Refuse examples that the scores were measured on.

    Raises:
        ScoreError: names one of them.
    """
    measured = set(zip(scores.user_ids, scores.example_ids, strict=True))
    shared = [example for example in examples if (example.user_id, example.id) in measured]
    if shared:
        raise ScoreError(
            f"{call}: the heads were chosen on {len(shared)} of these examples, such as {shared[0].id!r} of user "
            f"{shared[0].user_id!r}; evaluate on other examples"
        )


def _words(row: Mapping[Hashable, Any]) -> str:
    return f"{row['mean']:.3f} nats per token, interval {row['low']:.3f} to {row['high']:.3f}"


def ablation_cost(
    model: HookedModel,
    users: Sequence[User],
    heads: HeadSet | HeadScores,
    *,
    k: int = 10,
    n_random: int = 20,
    ablation: Ablation = "zero",
    positions: Positions = "response",
    max_examples: int | None = None,
    prompt: PromptConfig | None = None,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> AblationCost:
    """Ablate chosen heads on the evaluation examples of users, beside layer-matched random heads.

    Args:
        model: a hooked model.
        users: their evaluation examples are used.
        heads: the chosen heads, or scores whose top `k` are taken.
        k: how many heads to take from scores.
        n_random: random sets, each disjoint from the chosen heads and matched to their layers; where a layer
            has too few other heads, from the nearest layers, which `manifest["controls"]` then says.
        ablation: `"zero"` or `"uniform"`.
        positions: where.
        max_examples: the newest so many evaluation examples of each user.
        prompt: how prompts are built.
        seed: of the random sets.
        batch_size: branches a batch.
        progress: show a progress bar.

    Raises:
        ScoreError: the scores were measured on one of these examples.
    """
    examples: list[Example] = []
    for user in users:
        examples.extend(user.examples[-max_examples:] if max_examples else user.examples)
    if isinstance(heads, HeadScores):
        check_held_out("ablation_cost", heads, examples)
        heads = heads.top(k)
    if ablation not in ("zero", "uniform"):
        raise ScoreError(f"ablation_cost: ablation {ablation!r} is not offered here; use 'zero' or 'uniform'")
    draws = tuple(random_heads(model, heads, match="nearest", seed=draw_seed(seed, draw)) for draw in range(n_random))
    masks = torch.stack([head_set.mask(model.cfg) for head_set in (HeadSet(), heads, *draws)])
    runner = Runner.of(model)
    columns: dict[str, list[Tensor]] = {OWN: [], NONE: []}
    for example in tqdm(examples, desc="ablating heads", unit="example", disable=None if progress else True):
        for name, profile in ((OWN, "own"), (NONE, "none")):
            built = build_prompt(model, example, profile, config=prompt)  # type: ignore[arg-type]
            branches = Branches(runner, built, ablation=ablation, positions=positions, batch_size=batch_size)
            columns[name].append(branches.ablated(masks))
    return AblationCost(
        {name: torch.stack(column, dim=1) for name, column in columns.items()},
        tuple(example.user_id for example in examples),
        heads,
        draws,
        {
            "examples": [example.id for example in examples],
            "controls": "same layers" if all(_layers(draw) == _layers(heads) for draw in draws) else "nearest layers",
            "ablation": ablation,
            "positions": positions,
            "seed": seed,
            "prompt": (prompt or PromptConfig()).to_dict(),
        },
    )
