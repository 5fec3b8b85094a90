"""Preference vectors added to held-out examples without profile: what of the gain comes back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dps_lens.checks import check_number, check_whole
from dps_lens.data import Example, PromptConfig, User
from dps_lens.data.conditions import donors_of
from dps_lens.data.examples import key_of
from dps_lens.errors import HeadError, ScoreError
from dps_lens.intervene import Zero
from dps_lens.literals import Select
from dps_lens.model import HookedModel, native_attention
from dps_lens.scoring import CleanRun
from dps_lens.scoring.objectives import losses_of_rows
from dps_lens.selection import HeadSource
from dps_lens.validation.edits import Condition, EditWork
from dps_lens.validation.effects import SetEffects
from dps_lens.validation.work import HeldOutConfig
from dps_lens.vectors.preference import head_outputs
from dps_lens.work import Engine, Run, RunConfig


@dataclass(frozen=True)
class VectorConfig:
    """How preference vectors are made and added.

    Attributes:
        layer: the vector is added to the residual stream that enters this layer, at the response positions; a
            third of the way up by default, as for function vectors.
        scale: of the vector.
        examples: the newest so many discovery examples a vector is the mean of.
    """

    layer: int | None = None
    scale: float = 1.0
    examples: int | None = 4

    def __post_init__(self) -> None:
        check_number(ScoreError, "VectorConfig: scale", self.scale)
        if self.examples is not None:
            check_whole(ScoreError, "VectorConfig: examples", self.examples, least=1)


def vector_recovery(
    model: HookedModel,
    users: Sequence[User],
    families: Mapping[str, HeadSource],
    *,
    ks: Sequence[int] = (10,),
    vector_config: VectorConfig | None = None,
    n_random: int = 20,
    select: Select | Mapping[str, Select] = "global",
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    held_out_config: HeldOutConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> SetEffects:
    """Add preference vectors to evaluation examples without profile: how much of the gain comes back.

    A head that abstracts a user should bring it back; one that copies from the profile should not. Beside
    them: vectors of random heads, and of another user. Other arguments as in `ablation_curve`.

    Args:
        vector_config: layer, scale, and the examples that a vector is the mean of.

    Raises:
        HeadError: the layer is not in the model.
        ScoreError: as `ablation_curve`, or a user without discovery examples.
    """
    config, n_layers = vector_config or VectorConfig(), model.cfg.n_layers
    layer = n_layers // 3 if config.layer is None else config.layer
    if not 0 <= layer < n_layers:
        raise HeadError(f"vector_recovery: layer {layer} is not in this model of {n_layers} layers")
    run = Run(model, SetEffects, out, engine, run_config)
    work = VectorWork.of(
        "vector_recovery",
        model,
        users,
        families,
        ks,
        prompt_config=prompt_config,
        config=held_out_config,
        n_random=n_random,
        select=select,
        max_examples=max_examples,
        seed=seed,
        batch_size=run.config.batch_size,
        layer=layer,
        vector=config,
    )
    return work.run(run)


@dataclass
class VectorWork(EditWork):
    """The run of `vector_recovery`; the users' mean head outputs are units of their own."""

    layer: int = 0
    vector: VectorConfig = field(default_factory=VectorConfig)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        # Vectors are added at the response, whatever the scores were measured at.
        self.settings = replace(self.settings, positions="response", ablation=Zero())

    def run(self, run: Run) -> SetEffects:
        run.open(self.fingerprint)
        outputs = run.units(
            self, [_key(user.id) for user in self.users], "preference vectors", unit="user", split=False
        )
        self.outputs = {key: unit["outputs"] for key, unit in outputs.made.items()}
        return self.collect_run(run)

    def given(self, key: str) -> Any:
        """The vectors that an example meets: its user's, and another's."""
        if key not in self.by_key:
            return None
        example = self.by_key[key]
        owners = [example.user_id, *(donor.id for donor in donors_of(example, self.users, 1, self.seed))]
        return {_key(owner): self.outputs[_key(owner)] for owner in owners}

    def make(self, key: str, given: Any = None) -> dict[str, Tensor]:
        for user in self.users:
            if key == _key(user.id):
                config = self.settings.prompt_config
                outputs = head_outputs(self.model, user, max_examples=self.vector.examples, prompt_config=config)
                return {"outputs": self.vector.scale * outputs}
        self.outputs |= given or {}
        return super().make(key, given)

    def conditions(self, key: str, example: Example) -> dict[str, Condition]:
        clean = self.clean_run(self.build(example, "none"), "no_profile")
        donor = donors_of(example, self.users, 1, self.seed)
        add = partial(added, clean, self.layer)
        own = partial(add, self.outputs[_key(example.user_id)])
        conditions = {"vector": Condition("no_profile", clean, own, drawn=True)}
        if donor:
            other = partial(add, self.outputs[_key(donor[0].id)])
            conditions["vector_other"] = Condition("no_profile", clean, other)
        conditions["own"] = Condition("own", self.clean_run(self.build(example, "own"), "own"))
        return conditions

    def more(self) -> dict[str, Any]:
        return {"layer": self.layer, "scale": self.vector.scale, "vector_examples": self.vector.examples}


def _key(user: str) -> str:
    return key_of("vector", user, "")  # three parts, for an example's key has two


@torch.inference_mode()
def added(
    clean: CleanRun,
    layer: int,
    outputs: Float[Tensor, "layer head d_model"],
    masks: Bool[Tensor, "row layer head"],
) -> Float64[Tensor, "row pos"]:
    """Losses of the response when the summed outputs of each row's heads enter the residual stream at a layer."""
    losses = []
    with native_attention(clean.runner.model):
        residual = clean.residual(layer)
        for rows in masks.split(clean.batch_size):
            vectors = torch.einsum("rlh,lhd->rd", rows.float(), outputs).to(residual)
            logits = clean.runner.resume(
                {layer: residual + vectors[:, None]},
                clean.tokens,
                prompt=clean.prompt_cache,
                keep=len(clean.targets),
            )
            losses.append(losses_of_rows(clean.objective, logits, clean.targets, clean.logits))
    return torch.cat(losses)
