"""What is added inside the model while the answer is written: a direction of the residual stream, or of heads' z."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_number
from dps_lens.errors import HeadError, SteeringError
from dps_lens.heads import Head, HeadSet
from dps_lens.model import HookedModel, Hooks
from dps_lens.result import Result

if TYPE_CHECKING:
    import pandas


class Vector(Result):
    """What a rule adds inside the model.

    Attributes:
        values: what is added.
        label: what it is called.
    """

    error: ClassVar[type[SteeringError]] = SteeringError

    values: Tensor
    label: str

    @abstractmethod
    def additions(self, strength: float) -> dict[str, Tensor]:
        """By hook, what strength times the vector adds to every position there."""

    @abstractmethod
    def residuals(self, model: HookedModel) -> dict[int, Float[Tensor, " d_model"]]:
        """By layer, what it adds to the residual stream there, as float32 on the CPU."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """For manifests of what was written with it."""

    @abstractmethod
    def check(self, call: str, model: HookedModel) -> None:
        """Refuse a model that this is not a vector of.

        Raises:
            SteeringError: the model has other sizes; names the call.
        """

    def on(self, model: HookedModel, gamma: float = 1.0) -> Hooks:
        """A context in which γ times the vector is added to the last position of every pass.

        So `model.original_model.generate` writes with it what `generate` writes: with its cache of keys and values,
        which is its default, a pass after the prompt's has one position. Not for assisted decoding.

        Raises:
            SteeringError: the model is another.
        """
        self.check("on", model)
        check_number(SteeringError, "on: gamma", gamma)

        def add(activation: Tensor, hook: object, values: Tensor) -> Tensor:
            added = activation.clone()
            added[:, -1] += values.to(activation)
            return added

        return Hooks(model, [(name, partial(add, values=values)) for name, values in self.additions(gamma).items()])


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector(Vector):
    """A direction that `generate(rule="vector", vectors=…)` adds, times γ.

    Attributes:
        values: `Float[Tensor, "d_model"]`.
        layer: it is added to the residual stream that leaves this layer, from the last prompt token on.
        label: what the vector is called.
        manifest: how it was made.
    """

    stem: ClassVar[str] = "vector"

    values: Float[Tensor, " d_model"]
    layer: int
    label: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        return f"{self.label or 'vector'} at layer {self.layer}, norm {float(self.values.norm()):.3g}"

    def to_frame(self) -> "pandas.DataFrame":
        """One row a dimension: `dimension`, `value`."""
        import pandas as pd

        return pd.DataFrame({"dimension": range(len(self.values)), "value": self.values.tolist()})

    def additions(self, strength: float) -> dict[str, Tensor]:
        return {f"blocks.{self.layer}.hook_resid_post": strength * self.values}

    def residuals(self, model: HookedModel) -> dict[int, Float[Tensor, " d_model"]]:
        self.check("residuals", model)
        return {self.layer: self.values.float().cpu()}

    def settings(self) -> dict[str, Any]:
        return {"label": self.label, "layer": self.layer}

    def check(self, call: str, model: HookedModel) -> None:
        """Refuse a model that this is not a direction of.

        Raises:
            SteeringError: its layer or width is another; names the call.
        """
        if not 0 <= self.layer < model.cfg.n_layers or self.values.shape != (model.cfg.d_model,):
            raise SteeringError(
                f"{call}: a vector {list(self.values.shape)} at layer {self.layer} is not of this model, "
                f"[{model.cfg.d_model}] in {model.cfg.n_layers} layers"
            )


@dataclass(frozen=True, eq=False, repr=False)
class HeadVector(Vector):
    """What `generate(rule="head_vector", vectors=…)` adds to the z of heads, times γ; see `head_vectors`.

    Vectors of the same heads add up, and a number scales one: `(one + other) / 2`.

    Attributes:
        values: `Float[Tensor, "head d_head"]`, a row for each head of `heads`, in their order.
        heads: from the last prompt token on, each gets its row added to its z, before `W_O`.
        label: what the vector is called.
        manifest: how it was made.
    """

    stem: ClassVar[str] = "head_vector"

    values: Float[Tensor, "head d_head"]
    heads: HeadSet
    label: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.heads.shape is None:
            raise HeadError("HeadVector: its heads do not know their model; give HeadSet(heads, shape=(layers, heads))")
        if self.values.ndim != 2 or len(self.values) != len(self.heads):
            raise SteeringError(
                f"HeadVector: {len(self.heads)} heads and values {list(self.values.shape)}; give one row a head"
            )

    @property
    def _n_heads(self) -> int:
        assert self.heads.shape is not None, "refused when it was made"
        return self.heads.shape[1]

    def __add__(self, other: "HeadVector") -> "HeadVector":
        if (self.heads.heads, self.heads.shape) != (other.heads.heads, other.heads.shape):
            raise SteeringError("HeadVector: the two are of other heads, or of the same in another order")
        examples = [*self.manifest.get("examples", ()), *other.manifest.get("examples", ())]
        about = {**self.manifest, "examples": list(dict.fromkeys(examples))} if examples else self.manifest
        return replace(self, values=self.values + other.values, manifest=about)

    def __mul__(self, factor: float | int) -> "HeadVector":
        return replace(self, values=self.values * factor)

    __rmul__ = __mul__

    def __neg__(self) -> "HeadVector":
        return self * -1.0

    def __sub__(self, other: "HeadVector") -> "HeadVector":
        return self + -other

    def __truediv__(self, divisor: float | int) -> "HeadVector":
        return self * (1 / divisor)

    def weighted(self, weights: Mapping[Head, float]) -> "HeadVector":
        """With a strength for each head; heads that are not named get 0.

        Raises:
            HeadError: a weight is of another head.
        """
        if strangers := [head for head in weights if head not in self.heads]:
            raise HeadError(f"HeadVector: there is no {Head(*strangers[0])} among its heads, {self.heads}")
        each = torch.tensor([float(weights.get(head, 0.0)) for head in self.heads])
        return replace(self, values=self.values * each[:, None].to(self.values))

    def only(self, heads: HeadSet) -> "HeadVector":
        """The rows of some of its heads.

        Raises:
            HeadError: it has no such head, or none is given.
        """
        rows, chosen = rows_of(self.heads, heads), HeadSet(heads, heads.label, self.heads.shape)
        about = {**self.manifest, "heads": str(chosen)} if "heads" in self.manifest else self.manifest
        return replace(self, values=self.values[rows], heads=chosen, manifest=about)

    def summary(self) -> str:
        return f"{self.label or 'vector'} of {len(self.heads)} heads, norm {float(self.values.norm()):.3g}"

    def to_frame(self) -> "pandas.DataFrame":
        """One row a head: `head`, `norm`."""
        import pandas as pd

        return pd.DataFrame({"head": [str(head) for head in self.heads], "norm": self.values.norm(dim=1).tolist()})

    def additions(self, strength: float) -> dict[str, Tensor]:
        """By hook, what strength times the vector adds to every position there, `[head d_head]` of all heads."""
        added: dict[str, Tensor] = {}
        for (layer, head), row in zip(self.heads, self.values, strict=True):
            name = f"blocks.{layer}.attn.hook_z"
            added.setdefault(name, self.values.new_zeros(self._n_heads, self.values.shape[1]))[head] = strength * row
        return added

    def residuals(self, model: HookedModel) -> dict[int, Float[Tensor, " d_model"]]:
        """By layer, what the heads' sum adds there: `Σ_h values[h] W_O[h]`, as float32 on the CPU."""
        self.check("residuals", model)
        added: dict[int, Tensor] = {}
        for (layer, head), row in zip(self.heads, self.values, strict=True):
            out = row.float().cpu() @ model.blocks[layer].attn.W_O[head].detach().float().cpu()
            added[layer] = added[layer] + out if layer in added else out
        return added

    def settings(self) -> dict[str, Any]:
        return {"label": self.label, "heads": str(self.heads)}

    def check(self, call: str, model: HookedModel) -> None:
        """Refuse a model whose heads these are not.

        Raises:
            SteeringError: the model has other layers, heads or widths; names the call.
        """
        cfg = model.cfg
        if self.heads.shape != (cfg.n_layers, cfg.n_heads) or self.values.shape[1] != cfg.d_head:
            raise SteeringError(
                f"{call}: a vector of heads of {self.heads.shape} with d_head {self.values.shape[1]} is not of this "
                f"model, {(cfg.n_layers, cfg.n_heads)} with d_head {cfg.d_head}"
            )


def rows_of(heads: HeadSet, chosen: HeadSet) -> list[int]:
    """Places of some heads among others.

    Raises:
        HeadError: one is not there, or none is chosen.
    """
    if strangers := list(chosen - heads):
        raise HeadError(f"only: there is no {strangers[0]} among its heads, {heads}")
    if not len(chosen):
        raise HeadError("only: give at least one head")
    places = {head: row for row, head in enumerate(heads)}
    return [places[head] for head in chosen]
