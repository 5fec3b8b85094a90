"""Ablations at work: edits of chosen heads, one mask a row, as context managers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.errors import InterventionError
from dps_lens.heads import Head, HeadSet, HeadsLike
from dps_lens.intervene.ablations import Ablation, AblationLike, Zero, find_ablation
from dps_lens.intervene.positions import Where, everywhere, window
from dps_lens.literals import Positions
from dps_lens.model import (
    HookedModel,
    Hooks,
    ModelConfig,
    check_attention_writes,
    in_use,
    native_attention,
    runs_native,
)


@runtime_checkable
class Editing(Protocol):
    """Whatever can be on a model."""

    def on(self, model: HookedModel) -> AbstractContextManager[None]:
        """A context that applies it to every pass inside."""
        ...


# A hook point asks each hook for its repr; that of a dataclass would print its tensors.
@dataclass(frozen=True, repr=False)
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

    def on(self, model: HookedModel) -> Hooks:
        """A context that applies the edit to every pass inside; hooks sit on the masked layers only."""
        return Hooks(model, self.hooks(model))

    def hooks(self, model: HookedModel) -> list[tuple[str, Any]]:
        """Hooks that apply the edit, by name.

        Raises:
            InterventionError: it needs attention scores, which are not computed right now.
        """
        if self.ablation.site != "hook_z" and runs_native(model):
            raise InterventionError(
                f"ablation {self.ablation.name!r} edits attention scores, which native_attention does not compute"
            )
        if self.ablation.site != "hook_z":
            check_attention_writes(f"ablation {self.ablation.name!r}", model)
        layers = self.masks.any(dim=0).any(dim=-1).nonzero().flatten().tolist()
        return [(f"blocks.{layer}.attn.{self.ablation.site}", partial(self._hook, layer)) for layer in layers]

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
        rows, positions = self._rows(layer, activation), as_mask(where, n_pos, activation.device)
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


@dataclass(frozen=True, repr=False)
class Replacement:
    """Another z for one head a row, each row its own, at all positions of a pass.

    Attributes:
        heads: of the rows, by layer, as rows join (`Runner.resume`).
        z: of the rows.
    """

    heads: Sequence[Head]
    z: Float[Tensor, "row pos d_head"]

    def on(self, model: HookedModel) -> Hooks:
        """A context that applies it to every pass inside."""
        layers = dict.fromkeys(head.layer for head in self.heads)
        return Hooks(model, [(f"blocks.{layer}.attn.hook_z", partial(self._hook, layer)) for layer in layers])

    def _hook(self, layer: int, z: Tensor, hook: object) -> Tensor:
        rows = [row for row, head in enumerate(self.heads) if head.layer == layer]
        edited = z.clone()
        edited[rows, :, [self.heads[row].head for row in rows]] = self.z[rows].to(z)
        return edited


def as_mask(where: slice | Tensor, n_pos: int, device: torch.device) -> Bool[Tensor, "row pos"]:
    if isinstance(where, slice):
        mask = torch.zeros(1, n_pos, dtype=torch.bool, device=device)
        mask[:, where] = True
        return mask
    return where.to(device)


def _spread(values: Tensor, where: slice | Tensor, n_pos: int) -> Float[Tensor, "1 pos head d_head"]:
    """Lay values of the edited positions out over all positions."""
    chosen = as_mask(where, n_pos, values.device)[0]
    if int(chosen.sum()) != values.shape[0]:
        raise InterventionError(
            f"patch: {values.shape[0]} positions of values for {int(chosen.sum())} edited positions"
        )
    full = values.new_zeros(1, n_pos, *values.shape[1:])
    full[0, chosen] = values
    return full


def attention_for(model: HookedModel, ablation: Ablation) -> AbstractContextManager[None]:
    """`native_attention`, except for ablations of attention scores, which only the hooked attention computes.

    Raises:
        ModelBusyError: another thread is using the model.
        ModelCheckError: this architecture does not obey what is written into its attention scores.
    """
    if ablation.site == "hook_z":
        return native_attention(model)
    check_attention_writes(f"ablation {ablation.name!r}", model)
    return in_use(model)


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

    Contexts nest, and leave nothing behind, also after an exception. What runs inside is ablated whoever runs it in
    this thread: also streams of `generate` and tasks of asyncio that go on inside. Other threads are refused.

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
        ModelBusyError: another thread is using the model.

    >>> with ablate(model, HeadSet.parse("L3H1"), positions="all"):
    ...     model("Dear diary,")
    """
    chosen = find_ablation(ablation)
    values = chosen.standalone("ablate", decoding=False)
    with Edit(row_masks(heads, model.cfg), chosen, window(prompt, positions), values).on(model):
        yield
