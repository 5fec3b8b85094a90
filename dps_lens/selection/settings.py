"""Settings that the calls that test heads inherit from the scores that found them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dps_lens.data import PromptConfig
from dps_lens.errors import ScoreError
from dps_lens.found import FoundHeads
from dps_lens.intervene import Ablation, AblationLike, Mean, Patch, find_ablation
from dps_lens.literals import Positions
from dps_lens.scores import HeadScores
from dps_lens.scoring.objectives import NLL, Objective, ObjectiveLike, find_objective, objective_of
from dps_lens.scoring.sweep import ScoreConfig
from dps_lens.selection.rankings import HeadSource

_HEADS = {HeadScores: "scores.top(k)", FoundHeads: "found.heads"}
SHARED = ("ablation", "positions", "objective", "prompt_config")


@dataclass(frozen=True)
class Settings:
    """What the calls that test heads share with the scores that found them.

    Attributes:
        ablation: what is done to heads.
        positions: where.
        objective: what is measured.
        prompt_config: how prompts are built.
        means: for mean ablation, the mean z of every head by condition, where scores hold it.
    """

    ablation: Ablation
    positions: Positions
    objective: Objective
    prompt_config: PromptConfig
    means: Mapping[str, Tensor]


def inherited(
    call: str,
    families: Mapping[str, HeadSource],
    *,
    ablation: AblationLike | None = None,
    positions: Positions | None = None,
    objective: ObjectiveLike | None = None,
    prompt_config: PromptConfig | None = None,
    uses: Collection[str] = SHARED,
) -> Settings:
    """Ablation, positions, objective and prompts: as asked for, else as the families were scored, else the defaults.

    Args:
        call: the public function, for errors.
        families: scores and found sets among them are looked at.
        ablation: as asked for; so are the following.
        positions: where.
        objective: what is measured.
        prompt_config: how prompts are built.
        uses: settings that the call looks at; the others may differ.

    Raises:
        ScoreError: scores were made with other settings than asked for, or than each other, or with other means.
    """
    asked = find_ablation(ablation) if ablation is not None else None
    measured = find_objective(objective) if objective is not None else None
    agreed: dict[str, Any] = {
        "ablation": asked and asked.settings(),
        "positions": positions,
        "objective": measured and measured.settings(),
        "prompt_config": prompt_config and prompt_config.to_dict(),
    }
    means: dict[str, Tensor] = {}
    for name, family in families.items():
        if not isinstance(family, HeadScores | FoundHeads):
            continue
        if family.manifest.get("call") not in ("score_heads", "find_heads"):
            continue
        for key, value in ((key, agreed[key]) for key in uses):
            scored = family.manifest[key]
            if key == "ablation" and "patch" in (value, scored):
                continue  # a patch is no ablation that heads must have been chosen with
            given_means = key == "ablation" and isinstance(asked, Mean) and scored == Mean.name
            if value is not None and value != scored and not given_means:
                raise ScoreError(
                    f"{call}: family {name!r} was scored with {key} {scored!r}, asked for is {value!r}; score "
                    f"it anew, or pass its heads, {_HEADS[type(family)]}, to test them with other {key}"
                )
            agreed[key] = scored
        kept = family.tensors if isinstance(family, HeadScores) else {}
        own = {key.removeprefix("mean."): mean for key, mean in kept.items() if key.startswith("mean.")}
        if asked is None and "ablation" in uses:
            for condition in own.keys() & means.keys():
                if not torch.equal(own[condition], means[condition]):
                    raise ScoreError(
                        f"{call}: family {name!r} holds other means than a family before it; give ablation=Mean(z=…)"
                    )
        means |= own
    named = agreed["ablation"] or "zero"
    if asked is None and not isinstance(named, str):
        raise ScoreError(f"{call}: heads were scored with the ablation {named}; give that object as ablation=")
    measured = measured or objective_of(agreed["objective"] or NLL.name)
    if measured is None:
        raise ScoreError(
            f"{call}: heads were scored with the objective {agreed['objective']}; give that object, "
            "held_out_config=HeldOutConfig(objective=…)"
        )
    config = PromptConfig(**agreed["prompt_config"]) if agreed["prompt_config"] else PromptConfig()
    where: Positions = agreed["positions"] or "response"
    return Settings(asked or find_ablation(named), where, measured, config, means)


def score_settings(scores: HeadScores) -> dict[str, Any]:
    """Arguments of `score_heads` that measure scores like these; what was estimated one by one is measured.

    Raises:
        ScoreError: the scores do not come from `score_heads`, or from an ablation or objective of somebody's own.
    """
    manifest = scores.manifest
    names = (*SHARED, "against", "method", "discovery", "max_examples", "seed")
    missing = [name for name in names if name not in manifest]
    if missing:
        raise ScoreError(f"these scores do not come from score_heads: their manifest lacks {', '.join(missing)}")
    objective = objective_of(manifest["objective"])
    if not isinstance(manifest["ablation"], str) or objective is None:
        raise ScoreError("scores of an ablation or objective of your own cannot be measured again by name; score anew")
    ablation = find_ablation(manifest["ablation"])
    if isinstance(ablation, Patch):
        ablation = Patch(direction=manifest["direction"])
    settings = {name: manifest[name] for name in ("against", "positions", "max_examples", "seed")}
    rare = {name: manifest[name] for name in ("discovery", "n_donors", "ig_steps") if name in manifest}
    score_config = ScoreConfig(**rare)
    settings["method"] = "integrated" if manifest["method"] == "integrated" else "exact"
    prompt_config = PromptConfig(**manifest["prompt_config"])
    return settings | {
        "ablation": ablation,
        "objective": objective,
        "score_config": score_config,
        "prompt_config": prompt_config,
    }
