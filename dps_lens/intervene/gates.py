"""The z of heads, one map a row: scaled, let through by gates that gradients flow to, or taken from another row."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dps_lens.errors import InterventionError
from dps_lens.intervene.ablations import Ablation, Zero
from dps_lens.intervene.edits import Edit, as_mask
from dps_lens.intervene.positions import Where, everywhere
from dps_lens.model import HookedModel, Hooks


@dataclass(frozen=True, repr=False)
class Scale:
    """Multiplies z of every head by a factor, one map a row: 0 ablates, above 1 amplifies, 1 changes nothing.

    Attributes:
        factors: `Float[Tensor, "row layer head"]`.
        where: which positions are edited.
    """

    factors: Float[Tensor, "row layer head"]
    where: Where = everywhere

    def on(self, model: HookedModel) -> Hooks:
        """A context that applies this to every pass inside; hooks sit only on layers with a factor other than 1."""
        return Hooks(model, self.hooks(model))

    def hooks(self, model: HookedModel) -> list[tuple[str, Any]]:
        """Hooks that apply this, by name."""
        layers = (self.factors != 1).any(dim=0).any(dim=-1).nonzero().flatten().tolist()
        every = {layer: self.factors[:, layer, None, :, None] for layer in layers}
        return [(f"blocks.{layer}.attn.hook_z", partial(self._z, factors)) for layer, factors in every.items()]

    def _z(self, factors: Tensor, z: Tensor, hook: object) -> Tensor:
        where = self.where(z.shape[1])
        factors = factors.to(z)
        if isinstance(where, slice) and where == slice(None):
            return z * factors
        if where is None:
            return z
        chosen = as_mask(where, z.shape[1], z.device)[:, :, None, None]
        return torch.where(chosen, z * factors, z)


@dataclass(frozen=True, repr=False)
class FromRow:
    """Puts the z that heads have in another row of the same pass in the place of theirs.

    Attributes:
        masks: `Bool[Tensor, "row layer head"]`.
        source: `Int[Tensor, "row"]`, where each row's z comes from; rows without heads keep their own.
    """

    masks: Bool[Tensor, "row layer head"]
    source: Int[Tensor, " row"]

    def on(self, model: HookedModel) -> Hooks:
        """A context that applies this to every pass inside; hooks sit on the masked layers only."""
        return Hooks(model, self.hooks(model))

    def hooks(self, model: HookedModel) -> list[tuple[str, Any]]:
        """Hooks that apply this, by name."""
        layers = self.masks.any(dim=0).any(dim=-1).nonzero().flatten().tolist()
        return [(f"blocks.{layer}.attn.hook_z", partial(self._z, self.masks[:, layer])) for layer in layers]

    def _z(self, mask: Tensor, z: Tensor, hook: object) -> Tensor:
        return torch.where(mask[:, None, :, None].to(z.device), z[self.source.to(z.device)], z)


@dataclass(frozen=True, repr=False)
class Gate:
    """Lets each head through by a gate: z := z′ + g·(z − z′), where an ablation would put z′; gradients flow to g.

    A gate of 1 changes nothing, one of 0 ablates; z is what the head computes in this very pass.

    Attributes:
        gates: `Float[Tensor, "row layer head"]`; a single row serves every row of a batch.
        ablation: what stands behind a closed gate.
        where: which positions are edited.
        values: of the ablation, as in `Edit`.
    """

    gates: Float[Tensor, "row layer head"]
    ablation: Ablation = field(default_factory=Zero)
    where: Where = everywhere
    values: Tensor | None = None

    def on(self, model: HookedModel) -> Hooks:
        """A context that applies this to every pass inside; hooks sit on every layer."""
        return Hooks(model, self.hooks(model))

    def hooks(self, model: HookedModel) -> list[tuple[str, Any]]:
        """Hooks that apply this, by name.

        Raises:
            InterventionError: the ablation edits attention scores, between which and their ablation there is no path.
        """
        if self.ablation.site != "hook_z":
            raise InterventionError(f"gates act on hook_z, which ablation {self.ablation.name!r} does not edit")
        every = torch.ones(1, *self.gates.shape[1:], dtype=torch.bool)
        closed = Edit(every, self.ablation, self.where, self.values)
        layers = range(self.gates.shape[1])
        return [(f"blocks.{layer}.attn.hook_z", partial(self._z, closed, layer)) for layer in layers]

    def _z(self, closed: Edit, layer: int, z: Tensor, hook: object) -> Tensor:
        other = closed.replaced(layer, z)
        if other is z:
            return z
        gates = self.gates[:, layer, None, :, None].to(device=z.device, dtype=z.dtype)
        return other + gates * (z - other)
