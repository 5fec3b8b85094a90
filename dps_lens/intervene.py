"""Ablations of attention heads, on `hook_z`, as context managers.

One vocabulary for scoring, validation and steering: an `Ablation` says what stands in the place of a head's z,
its output before `W_O`, `blocks.{layer}.attn.hook_z`, shape `[batch pos head d_head]`. `Zero`, `Mean`, `Patch` and
`Uniform` have their names as shorthands; a subclass of your own is taken wherever a name is.
"""

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dps_lens.data import Example, Prompt, PromptConfig, Shown, build_prompt
from dps_lens.errors import InterventionError
from dps_lens.extensions import settings_of
from dps_lens.heads import HeadSet, HeadsLike
from dps_lens.literals import DIRECTIONS, POSITIONS, Direction, Positions
from dps_lens.model import HookedModel, ModelConfig, native_attention, runner_of, runs_native

Selection: TypeAlias = slice | Tensor | None
"""Positions of a pass that are edited: a slice, `Bool[Tensor, "row pos"]`, or None for none."""

Where: TypeAlias = Callable[[int], Selection]
"""Maps the number of positions in a pass to those that are edited."""


def everywhere(n_pos: int) -> Selection:
    """Edit every position of every pass."""
    return slice(None)


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
                + (", which is not there while text is written; use 'zero', 'uniform' or Mean(z=…)" if decoding else
                   ": Patch(z=record_z(…))")
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


@dataclass(frozen=True)
class Edit:
    """An ablation of chosen heads, one mask a row.

    Attributes:
        masks: `Bool[Tensor, "row layer head"]`; a single row serves every row of a batch.
        ablation: what is put there.
        where: which positions are edited.
        values: of the ablation: `[layer head d_head]`, `[layer pos head d_head]` over the edited positions, or None.
        rows_join: rows may join from layer to layer (`Runner.resume`); a layer then uses the first masks.
    """

    masks: Bool[Tensor, "row layer head"]
    ablation: Ablation = field(default_factory=Zero)
    where: Where = everywhere
    values: Tensor | None = None
    rows_join: bool = False

    def __post_init__(self) -> None:
        if self.values is not None and self.values.ndim not in (3, 4):
            raise InterventionError(
                f"ablation {self.ablation.name!r}: values are [layer head d_head] or [layer pos head d_head], found "
                f"{list(self.values.shape)}"
            )

    @contextmanager
    def on(self, model: HookedModel) -> Iterator[None]:
        """Apply the edit to every pass inside; hooks sit on the masked layers only."""
        if self.ablation.site != "hook_z" and runs_native(model):
            raise InterventionError(
                f"ablation {self.ablation.name!r} edits attention scores, which native_attention does not compute"
            )
        layers = self.masks.any(dim=0).any(dim=-1).nonzero().flatten().tolist()
        hooks = [(f"blocks.{layer}.attn.{self.ablation.site}", partial(self._hook, layer)) for layer in layers]
        with model.hooks(fwd_hooks=hooks):
            yield

    def replaced(self, layer: int, activation: Tensor) -> Tensor:
        """What an activation becomes under this edit: z `[row pos head d_head]`, or scores `[row head query key]`."""
        of_z = self.ablation.site == "hook_z"
        n_pos = activation.shape[1 if of_z else 2]
        where = self.where(n_pos)
        if where is None:
            return activation
        values = None
        if self.values is not None:
            values = self.values[layer].to(device=activation.device, dtype=activation.dtype)
            values = _spread(values, where, n_pos) if values.ndim == 3 else values
        rows, positions = self._rows(layer, activation), _as_mask(where, n_pos, activation.device)
        chosen = rows[:, None, :] & positions[:, :, None] if of_z else rows[:, :, None] & positions[:, None, :]
        return torch.where(chosen[..., None], self.ablation.replace(activation, values), activation)

    def _hook(self, layer: int, activation: Tensor, hook: object) -> Tensor | None:
        edited = self.replaced(layer, activation)
        return None if edited is activation else edited

    def _rows(self, layer: int, activation: Tensor) -> Tensor:
        mask, rows = self.masks[:, layer].to(activation.device), activation.shape[0]
        if len(mask) == 1 or len(mask) == rows:
            return mask
        if self.rows_join:
            return mask[:rows]
        raise InterventionError(f"the ablation holds {len(mask)} rows of heads, the batch has {rows} rows")


@dataclass(frozen=True)
class Scale:
    """Multiplies z of every head by a factor, one map a row: 0 ablates, above 1 amplifies, 1 changes nothing.

    Attributes:
        factors: `Float[Tensor, "row layer head"]`.
        where: which positions are edited.
    """

    factors: Float[Tensor, "row layer head"]
    where: Where = everywhere

    @contextmanager
    def on(self, model: HookedModel) -> Iterator[None]:
        """Apply to every pass inside; hooks sit only on layers with a factor other than 1."""
        layers = (self.factors != 1).any(dim=0).any(dim=-1).nonzero().flatten().tolist()
        hooks = []
        for layer in layers:
            factors = self.factors[:, layer, None, :, None]
            hooks.append((f"blocks.{layer}.attn.hook_z", partial(self._z, factors)))
        with model.hooks(fwd_hooks=hooks):
            yield

    def _z(self, factors: Tensor, z: Tensor, hook: object) -> Tensor:
        where = self.where(z.shape[1])
        factors = factors.to(z)
        if isinstance(where, slice) and where == slice(None):
            return z * factors
        if where is None:
            return z
        chosen = _as_mask(where, z.shape[1], z.device)[:, :, None, None]
        return torch.where(chosen, z * factors, z)


def _as_mask(where: slice | Tensor, n_pos: int, device: torch.device) -> Bool[Tensor, "row pos"]:
    if isinstance(where, slice):
        mask = torch.zeros(1, n_pos, dtype=torch.bool, device=device)
        mask[:, where] = True
        return mask
    return where.to(device)


def _spread(values: Tensor, where: slice | Tensor, n_pos: int) -> Float[Tensor, "1 pos head d_head"]:
    """Lay values of the edited positions out over all positions."""
    chosen = _as_mask(where, n_pos, values.device)[0]
    if int(chosen.sum()) != values.shape[0]:
        raise InterventionError(
            f"patch: {values.shape[0]} positions of values for {int(chosen.sum())} edited positions"
        )
    full = values.new_zeros(1, n_pos, *values.shape[1:])
    full[0, chosen] = values
    return full


def attention_for(model: HookedModel, ablation: Ablation) -> AbstractContextManager[None]:
    """`native_attention`, except for ablations of attention scores, which only the hooked attention computes."""
    return native_attention(model) if ablation.site == "hook_z" else nullcontext()


def row_masks(heads: "HeadsLike | Tensor", cfg: ModelConfig) -> Bool[Tensor, "row layer head"]:
    """Head sets, or a ready mask, as one mask a row.

    Raises:
        HeadError: a head lies outside the model.
    """
    if isinstance(heads, Tensor):
        if heads.dtype != torch.bool or heads.shape[-2:] != (cfg.n_layers, cfg.n_heads) or heads.ndim not in (2, 3):
            raise InterventionError(
                f"a head mask is Bool [row {cfg.n_layers} {cfg.n_heads}], found {heads.dtype} {list(heads.shape)}"
            )
        return heads if heads.ndim == 3 else heads[None]
    sets = [heads] if isinstance(heads, HeadSet) else list(heads)
    if not sets:
        raise InterventionError("no head sets were given; an empty HeadSet() ablates nothing")
    return torch.stack([head_set.mask(cfg) for head_set in sets])


def window(prompt: Prompt | None, positions: Positions) -> Where:
    """Which positions of a pass an ablation edits.

    `response` starts at the last prompt token, the position whose logits give the first response
    token; `profile` covers the profile's tokens. A pass of one token is a decoding step after the prompt.

    Raises:
        InterventionError: positions are unknown, or need a prompt that was not given.
    """
    if positions not in POSITIONS:
        raise InterventionError(f"positions {positions!r} are unknown; use one of {', '.join(POSITIONS)}")
    if positions == "all":
        return everywhere
    if prompt is None:
        raise InterventionError(
            f"positions={positions!r} needs prompt=build_prompt(…); without one use positions='all'"
        )
    start, (first, stop) = prompt.spans["response"][0], prompt.spans["profile"]

    def where(n_pos: int) -> Selection:
        if n_pos == 1:
            return slice(None) if positions == "response" else None
        if n_pos < start:
            raise InterventionError(
                f"positions={positions!r}: a pass of {n_pos} tokens is neither the whole prompt of {start} tokens "
                "nor one decoding step after it"
            )
        if positions == "response":
            return slice(start - 1, None)
        return slice(first, stop) if stop > first else None

    return where


@contextmanager
def ablate(
    model: HookedModel,
    heads: "HeadsLike | Tensor",
    *,
    ablation: AblationLike = "zero",
    positions: Positions = "response",
    prompt: Prompt | None = None,
) -> Iterator[None]:
    """Ablate heads in every pass of the model inside the block.

    Contexts nest, and leave nothing behind, also after an exception.

    Args:
        model: a hooked model.
        heads: one set for all rows of a batch, one set a row, or `Bool[Tensor, "row layer head"]`.
        ablation: `"zero"`, `"uniform"`, `Mean(z=…)`, `Patch(z=…)` or one of your own; `record_z` makes z.
        positions: `"all"`, `"response"` (from the last prompt token on) or `"profile"`.
        prompt: the prompt that is run; needed for `"response"` and `"profile"`. Every pass is then the
            whole prompt, with or without response, or one decoding step after it; rows are not padded.

    Raises:
        HeadError: a head is outside the model.
        InterventionError: the ablation is not defined for these arguments.

    >>> with ablate(model, HeadSet.parse("L3H1"), positions="all"):
    ...     model("Dear diary,")
    """
    chosen = find_ablation(ablation)
    values = chosen.standalone("ablate", decoding=False)
    with Edit(row_masks(heads, model.cfg), chosen, window(prompt, positions), values).on(model):
        yield


@contextmanager
def recording_z(model: HookedModel, where: Where = everywhere) -> Iterator[dict[int, Tensor]]:
    """Collect `z` at the chosen positions of the pass inside; layer → `[row pos head d_head]`."""
    recorded: dict[int, Tensor] = {}

    def keep(layer: int, z: Tensor, hook: object) -> None:
        chosen = where(z.shape[1])
        if isinstance(chosen, slice):
            recorded[layer] = z[:, chosen].detach().clone()

    layers = range(model.cfg.n_layers)
    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", partial(keep, layer)) for layer in layers]):
        yield recorded


@torch.inference_mode()
def record_z(
    model: HookedModel, prompt: Prompt, *, positions: Positions = "response"
) -> Float[Tensor, "layer pos head d_head"]:
    """The z of every head over the edited positions of a prompt with its response.

    `Patch(z=…)` takes it as it is, `Mean(z=…)` its mean over positions.
    """
    runner = runner_of(model)
    with native_attention(model), recording_z(model, window(prompt, positions)) as recorded:
        runner.logits(prompt.tokens[None].to(runner.device), keep=1)
    if not recorded:
        raise InterventionError(f"record_z: the prompt has no positions {positions!r}")
    return torch.stack([recorded[layer][0].cpu() for layer in sorted(recorded)])
