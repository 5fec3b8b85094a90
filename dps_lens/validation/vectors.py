"""Vectors of heads added to held-out examples without profile: what of the gain comes back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dps_lens.checks import check_number, check_whole
from dps_lens.data import Example, PromptConfig, User
from dps_lens.data.conditions import donors_of
from dps_lens.data.examples import key_of, newest
from dps_lens.errors import HeadError, ScoreError
from dps_lens.intervene import Ablation, Zero
from dps_lens.literals import VECTOR_AGAINST, Select, VectorAgainst
from dps_lens.model import HookedModel, native_attention
from dps_lens.scoring import CleanRun, nll_run
from dps_lens.scoring.objectives import losses_of_rows
from dps_lens.selection import HeadSource
from dps_lens.validation.edits import Condition, EditWork
from dps_lens.validation.effects import SetEffects
from dps_lens.validation.work import HeldOutConfig
from dps_lens.vectors.heads import HeadDifferences
from dps_lens.vectors.preference import head_outputs
from dps_lens.work import Engine, Run, RunConfig


@dataclass(frozen=True)
class VectorConfig:
    """How vectors are made and added, at the response positions.

    Attributes:
        against: None adds the preference vector, the summed mean outputs of the heads, to the residual stream. A
            counterfactual, as in `head_vectors`, adds the difference of means at each head's own z.
        layer: which layer's residual stream the preference vector enters; a third of the way up by default, as for
            function vectors.
        scale: of the vector.
        examples: the newest so many discovery examples a vector is the mean of.
    """

    against: VectorAgainst | None = None
    layer: int | None = None
    scale: float = 1.0
    examples: int | None = 4

    def __post_init__(self) -> None:
        if self.against not in (None, *VECTOR_AGAINST):
            allowed = ", ".join(VECTOR_AGAINST)
            raise ScoreError(f"VectorConfig: against {self.against!r} is unknown; use None or one of {allowed}")
        if self.against is not None and self.layer is not None:
            raise ScoreError("VectorConfig: with against=… vectors are added at their own heads; leave out layer=")
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
    """Add vectors of heads to evaluation examples without profile: how much of the gain comes back.

    A head that abstracts a user should bring it back; one that copies from the profile should not. Beside
    them: vectors of random heads, and of another user (against other users, only with a third one, for the tested
    user's profile must have no part in it). Other arguments as in `ablation_curve`.

    Args:
        vector_config: mean outputs in one layer, or differences at the heads; scale, and the examples that a vector is
            the mean of.

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


@dataclass(frozen=True, eq=False)
class Shift(Ablation):
    """z := z + a vector of the head."""

    name: ClassVar[str] = "shift"
    z: Float[Tensor, "layer head d_head"]

    def replace(self, activation: Tensor, values: Tensor | None) -> Tensor:
        return activation if values is None else activation + values

    def standalone(self, call: str, *, decoding: bool = True) -> Tensor:
        return self.z


@dataclass
class VectorWork(EditWork):
    """The run of `vector_recovery`; the users' vectors are units of their own."""

    layer: int = 0
    vector: VectorConfig = field(default_factory=VectorConfig)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vector.against == "other_user" and len(self.users) < 2:
            raise ScoreError("vector_recovery: against='other_user' needs at least two users; use 'no_profile'")
        if self.compares:
            raise ScoreError(
                f"vector_recovery: it measures one response, and objective {self.settings.objective.name!r} compares "
                "several; give held_out_config=HeldOutConfig(objective='nll')"
            )
        # Vectors are added at the response, whatever the scores were measured at.
        self.settings = replace(self.settings, positions="response", ablation=Zero())

    @cached_property
    def wanted(self) -> dict[str, tuple[User, User | None]]:
        """The vectors by key: whose, and for a test on whom."""
        of_users: dict[str, tuple[User, User | None]] = {_key(user): (user, None) for user in self.users}
        tested = [self.other(example) for example in self.by_key.values()]
        return of_users | {_key(*pair): pair for pair in tested if pair is not None}

    def other(self, example: Example) -> tuple[User, User | None] | None:
        """Another user, whose vector is added beside the own one; one against other users is made without the tested
        one's profile, which it would take away. None where there is nobody to make it against."""
        found = donors_of(example, self.users, 1, self.seed)
        if self.vector.against != "other_user":
            return (found[0], None) if found else None
        (tested,) = (user for user in self.users if user.id == example.user_id)
        return (found[0], tested) if len(self.users) > 2 else None

    def run(self, run: Run) -> SetEffects:
        run.open(self.fingerprint)
        made = run.units(self, list(self.wanted), "vectors", unit="user", split=False)
        self.vectors = {key: unit["vector"] for key, unit in made.made.items()}
        return self.collect_run(run)

    def given(self, key: str) -> Any:
        """The vectors that an example meets: its user's, and another's."""
        if key not in self.by_key:
            return None
        return {one: self.vectors[one] for one in self._met(self.by_key[key])}

    def _met(self, example: Example) -> list[str]:
        (owner,) = (user for user in self.users if user.id == example.user_id)
        other = self.other(example)
        return [_key(owner), *([_key(*other)] if other is not None else [])]

    def make(self, key: str, given: Any = None) -> dict[str, Tensor]:
        if key in self.wanted:
            return {"vector": self.vector.scale * self._vector(*self.wanted[key])}
        self.vectors |= given or {}
        return super().make(key, given)

    def _vector(self, user: User, tested: User | None) -> Tensor:
        config, against = self.settings.prompt_config, self.vector.against
        if against is None:
            return head_outputs(self.model, user, max_examples=self.vector.examples, prompt_config=config)
        if not user.discovery_examples():
            raise ScoreError(f"vector_recovery: user {user.id!r} has no discovery example; leave the user out")
        others = [one for one in self.users if tested is None or one.id != tested.id]
        every = HeadDifferences(self.model, others, against=against, prompt_config=config, seed=self.seed)
        examples = newest(user.discovery_examples(), self.vector.examples)
        return torch.stack([every.of(example) for example in examples]).mean(0)

    def conditions(self, key: str, example: Example) -> dict[str, Condition]:
        clean = nll_run(self.clean_run(self.build(example, "none"), "no_profile"))
        own, *others = [self._adding(clean, self.vectors[one]) for one in self._met(example)]
        conditions = {"vector": Condition("no_profile", clean, own, drawn=True)}
        if others:
            conditions["vector_other"] = Condition("no_profile", clean, others[0])
        conditions["own"] = Condition("own", self.clean_run(self.build(example, "own"), "own"))
        return conditions

    def _adding(self, clean: CleanRun, vector: Tensor) -> Callable[[Bool[Tensor, "row layer head"]], Tensor]:
        if self.vector.against is None:
            return partial(added, clean, self.layer, vector)
        return clean.with_values(Shift(vector)).ablated_losses

    def more(self) -> dict[str, Any]:
        vector = self.vector
        layer = self.layer if vector.against is None else None
        return {"against": vector.against, "layer": layer, "scale": vector.scale, "vector_examples": vector.examples}


def _key(user: User, tested: User | None = None) -> str:
    return key_of("vector", user.id, tested.id if tested else "")  # three parts, for an example's key has two


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
