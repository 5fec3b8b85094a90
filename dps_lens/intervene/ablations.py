"""What stands in the place of the z of the heads that are ablated."""

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data import Example, Prompt, PromptConfig, Shown, build_prompt
from dps_lens.errors import InterventionError
from dps_lens.extensions import settings_of
from dps_lens.intervene.record import record_z
from dps_lens.literals import DIRECTIONS, Direction, Positions
from dps_lens.model import HookedModel


@dataclass(frozen=True)
class Context:
    """What an ablation may look at to find its values for a prompt.

    Attributes:
        model: the hooked model.
        examples: discovery examples of all users, never evaluation examples.
        condition: what the prompt shows: `"own"`, `"no_profile"`, `"other_user"` or `"neutral"`.
        positions: where heads are ablated.
        prompt_config: how prompts are built.
        means: by condition, the mean z of every head over the edited positions of the examples; for `Mean` only.
    """

    model: HookedModel
    examples: Sequence[Example] = ()
    condition: str = "own"
    positions: "Positions" = "response"
    prompt_config: PromptConfig = field(default_factory=PromptConfig)
    means: Mapping[str, Tensor] = field(default_factory=dict)

    def build(self, example: Example, profile: Shown | None = None) -> Prompt:
        """The prompt of an example, built as all others are; with its own profile where this condition shows one."""
        profile = profile or ("own" if self.condition in ("own", "other_user") else "none")
        return build_prompt(self.model, example, profile, config=self.prompt_config)

    def z(self, prompt: Prompt) -> Float[Tensor, "layer pos head d_head"]:
        """z of a prompt's clean run at its edited positions; the last response token is read, never run."""
        z = record_z(self.model, prompt, positions=self.positions)
        return z if self.positions == "profile" else z[:, :-1]


class Ablation(ABC):
    """What stands in the place of the z of the heads that are ablated.

    Subclasses are frozen dataclasses, so that their fields are in the manifest of what they were used for. They give
    a `name`, and either `values_for`, what a prompt's z is replaced by, or `replace`, what becomes of a z.

    Attributes:
        name: as it stands in manifests.
        site: the hook that is edited: `"hook_z"`, or `"hook_attn_scores"`, `[row head query key]`, which only the
            hooked attention computes.
    """

    name: ClassVar[str]
    site: ClassVar[Literal["hook_z", "hook_attn_scores"]] = "hook_z"

    def values_for(self, prompt: Prompt, context: Context) -> Tensor | None:
        """`[layer head d_head]`, or `[layer pos head d_head]` over the edited positions of the prompt, or None."""
        return None

    def replace(self, activation: Tensor, values: Tensor | None) -> Tensor:
        """What an activation becomes where heads are ablated.

        Args:
            activation: z `[row pos head d_head]`, or attention scores.
            values: of `values_for` in this layer, laid out like z.
        """
        return activation.new_zeros(()) if values is None else values

    def standalone(self, call: str, *, decoding: bool = True) -> Tensor | None:
        """Values where no users' examples are at hand: in `ablate`, and while text is written.

        Raises:
            InterventionError: this ablation needs examples, or a run of the same tokens.
        """
        if type(self).values_for is Ablation.values_for:
            return None
        raise InterventionError(
            f"{call}: ablation {self.name!r} takes its values from the users' examples, which only score_heads and the "
            "calls that test heads look at; use 'zero', 'uniform' or Mean(z=…)"
        )

    def settings(self) -> Any:
        """The name, with the fields where there are any, for a manifest."""
        return settings_of(self.name, self)


@dataclass(frozen=True)
class Zero(Ablation):
    """z := 0."""

    name: ClassVar[str] = "zero"


@dataclass(frozen=True, eq=False)
class Mean(Ablation):
    """z := its mean per head, over the edited positions of discovery examples, for each condition on its own.

    Attributes:
        z: `Float[Tensor, "layer head d_head"]`, such as `scores.tensors["mean.own"]`, where no examples are at hand.
    """

    name: ClassVar[str] = "mean"
    z: Tensor | None = None

    def values_for(self, prompt: Prompt, context: Context) -> Tensor | None:
        if self.z is not None:
            return self.z
        # Text that is nobody's is nearest to a task without a profile.
        return context.means.get(context.condition, context.means.get("no_profile", context.means.get("own")))

    def standalone(self, call: str, *, decoding: bool = True) -> Tensor | None:
        if self.z is None:
            raise InterventionError(
                f"{call}: ablation 'mean' needs the means: Mean(z=scores.tensors['mean.own']) of scores with this "
                "ablation, or Mean(z=record_z(…).mean(1))"
            )
        return self.z


@dataclass(frozen=True, eq=False)
class Patch(Ablation):
    """z := the z of another run at the same positions (activation patching).

    Attributes:
        z: `Float[Tensor, "layer pos head d_head"]` over the edited positions; calls that know the other run record it.
        direction: `"noising"` puts the counterfactual run's z into the profile run; `"denoising"` the reverse.
    """

    name: ClassVar[str] = "patch"
    z: Tensor | None = None
    direction: "Direction" = "noising"

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise InterventionError(f"Patch: direction {self.direction!r} is unknown; use {' or '.join(DIRECTIONS)}")

    def values_for(self, prompt: Prompt, context: Context) -> Tensor | None:
        return self.standalone("patch", decoding=False)

    def standalone(self, call: str, *, decoding: bool = True) -> Tensor | None:
        if decoding or self.z is None:
            raise InterventionError(
                f"{call}: ablation 'patch' needs the z of another run of the same tokens"
                + (", which is not there while text is written; use 'zero', 'uniform', Mean(z=…), or generate's rule "
                   "'dps-patch'" if decoding else ": Patch(z=record_z(…))")
            )  # fmt: skip
        return self.z

    def settings(self) -> Any:
        return self.name


@dataclass(frozen=True)
class Uniform(Ablation):
    """Attention spread evenly over the positions that the query sees, so that z is the mean of v over them."""

    name: ClassVar[str] = "uniform"
    site: ClassVar[Literal["hook_z", "hook_attn_scores"]] = "hook_attn_scores"

    def replace(self, activation: Tensor, values: Tensor | None) -> Tensor:
        # Masked keys hold the dtype's minimum or -inf; equal scores elsewhere give equal weights.
        return activation.masked_fill(activation > torch.finfo(activation.dtype).min / 2, 0)


AblationLike: TypeAlias = Ablation | str
"""An ablation, or the name of one."""

ABLATIONS: dict[str, type[Ablation]] = {one.name: one for one in (Zero, Mean, Patch, Uniform)}


def find_ablation(asked: AblationLike) -> Ablation:
    """An ablation by name, or the object itself.

    Raises:
        InterventionError: the name is unknown.
    """
    if isinstance(asked, Ablation):
        return asked
    if asked not in ABLATIONS:
        raise InterventionError(
            f"ablation {asked!r} is unknown; use one of {', '.join(ABLATIONS)}, or an Ablation of your own"
        )
    return ABLATIONS[asked]()
