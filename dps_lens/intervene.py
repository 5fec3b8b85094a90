"""Ablations of attention heads, on `hook_z`, as context managers.

One vocabulary for scoring, validation and steering. `z` is a head's output before `W_O`,
`blocks.{layer}.attn.hook_z`, shape `[batch pos head d_head]`:

- `zero`: z := 0.
- `mean`: z := a given mean per head.
- `patch`: z := the z of another run at the same positions.
- `uniform`: attention spread evenly over the positions that the query sees, so that z is the mean
  of v over them; set at `hook_attn_scores`, and therefore run on the hooked attention.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dps_lens.errors import InterventionError
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel, Runner, native_attention, runs_native

Ablation: TypeAlias = Literal["zero", "mean", "patch", "uniform"]
Positions: TypeAlias = Literal["all", "response", "profile"]
ABLATIONS: tuple[Ablation, ...] = ("zero", "mean", "patch", "uniform")
POSITIONS: tuple[Positions, ...] = ("all", "response", "profile")

Selection: TypeAlias = slice | Tensor | None
"""Positions of a pass that are edited: a slice, `Bool[Tensor, "row pos"]`, or None for none."""

Where: TypeAlias = Callable[[int], Selection]
"""Maps the number of positions in a pass to those that are edited."""


@runtime_checkable
class HasSpans(Protocol):
    """A prompt, as far as an ablation looks at it."""

    @property
    def spans(self) -> dict[str, tuple[int, int]]:
        """`"profile"`, `"task"` and `"response"` as `(start, stop)`."""
        ...


def everywhere(n_pos: int) -> Selection:
    """Edit every position of every pass."""
    return slice(None)


@dataclass(frozen=True)
class Edit:
    """An ablation of chosen heads, one mask a row.

    Attributes:
        masks: `Bool[Tensor, "row layer head"]`; a single row serves every row of a batch.
        ablation: one of `ABLATIONS`.
        where: which positions are edited.
        values: for `mean` `Float[Tensor, "layer head d_head"]`, for `patch`
            `Float[Tensor, "layer pos head d_head"]` over the edited positions.
        growing: rows may join from layer to layer (`Runner.resume`); a layer then uses the first masks.
    """

    masks: Bool[Tensor, "row layer head"]
    ablation: Ablation = "zero"
    where: Where = everywhere
    values: Tensor | None = None
    growing: bool = False

    def __post_init__(self) -> None:
        if self.ablation not in ABLATIONS:
            raise InterventionError(f"ablation {self.ablation!r} is unknown; use one of {', '.join(ABLATIONS)}")
        needs = {"mean": 3, "patch": 4}.get(self.ablation)
        if needs and (self.values is None or self.values.ndim != needs):
            shape = "layer head d_head" if needs == 3 else "layer pos head d_head"
            raise InterventionError(f"ablation {self.ablation!r} needs values= of shape [{shape}]")
        if not needs and self.values is not None:
            raise InterventionError(f"ablation {self.ablation!r} takes no values=")

    @contextmanager
    def on(self, model: HookedModel) -> Iterator[None]:
        """Apply the edit to every pass inside; hooks sit on the masked layers only."""
        if self.ablation == "uniform" and runs_native(model):
            raise InterventionError(
                "ablation 'uniform' edits attention scores, which native_attention does not compute"
            )
        name, edit = ("hook_attn_scores", self._scores) if self.ablation == "uniform" else ("hook_z", self._z)
        layers = self.masks.any(dim=0).any(dim=-1).nonzero().flatten().tolist()
        hooks = [(f"blocks.{layer}.attn.{name}", partial(_call_with_layer, edit, layer)) for layer in layers]
        with model.hooks(fwd_hooks=hooks):
            yield

    def _rows(self, layer: int, activation: Tensor) -> Tensor:
        mask, rows = self.masks[:, layer].to(activation.device), activation.shape[0]
        if len(mask) == 1 or len(mask) == rows:
            return mask
        if self.growing:
            return mask[:rows]
        raise InterventionError(f"the ablation holds {len(mask)} rows of heads, the batch has {rows} rows")

    def replaced(self, layer: int, z: Tensor) -> Tensor:
        """What `z`, `[row pos head d_head]`, becomes under this edit."""
        edited = self._z(layer, z)
        return z if edited is None else edited

    def _z(self, layer: int, z: Tensor) -> Tensor | None:
        where = self.where(z.shape[1])
        if where is None:
            return None
        new: Tensor = z.new_zeros(())
        if self.values is not None:
            new = self.values[layer].to(device=z.device, dtype=z.dtype)
            if self.ablation == "patch":
                new = _spread(new, where, z.shape[1])
        chosen = self._rows(layer, z)[:, None, :] & _as_mask(where, z.shape[1], z.device)[:, :, None]
        return torch.where(chosen[..., None], new, z)

    def _scores(self, layer: int, scores: Tensor) -> Tensor | None:
        where = self.where(scores.shape[2])
        if where is None:
            return None
        queries = _as_mask(where, scores.shape[2], scores.device)
        chosen = self._rows(layer, scores)[:, :, None, None] & queries[:, None, :, None]
        # Masked keys hold the dtype's minimum or -inf; equal scores elsewhere give equal weights.
        visible = scores > torch.finfo(scores.dtype).min / 2
        return torch.where(chosen & visible, scores.new_zeros(()), scores)


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

    def _z(self, factors: Tensor, z: Tensor, hook: Any) -> Tensor:
        where = self.where(z.shape[1])
        factors = factors.to(z)
        if isinstance(where, slice) and where == slice(None):
            return z * factors
        if where is None:
            return z
        chosen = _as_mask(where, z.shape[1], z.device)[:, :, None, None]
        return torch.where(chosen, z * factors, z)


def _call_with_layer(edit: Callable[[int, Tensor], Tensor | None], layer: int, tensor: Tensor, hook: Any) -> Any:
    return edit(layer, tensor)


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
    """`native_attention`, except for `uniform`, which edits attention scores."""
    return nullcontext() if ablation == "uniform" else native_attention(model)


def row_masks(heads: "HeadSet | Sequence[HeadSet] | Tensor", cfg: Any) -> Bool[Tensor, "row layer head"]:
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


def window(prompt: HasSpans | None, positions: Positions) -> Where:
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
    heads: "HeadSet | Sequence[HeadSet] | Tensor",
    *,
    ablation: Ablation = "zero",
    positions: Positions = "response",
    prompt: HasSpans | None = None,
    values: Tensor | None = None,
) -> Iterator[None]:
    """Ablate heads in every pass of the model inside the block.

    Contexts nest, and leave nothing behind, also after an exception.

    Args:
        model: a hooked model.
        heads: one set for all rows of a batch, one set a row, or `Bool[Tensor, "row layer head"]`.
        ablation: `"zero"`, `"mean"`, `"patch"` or `"uniform"`.
        positions: `"all"`, `"response"` (from the last prompt token on) or `"profile"`.
        prompt: the prompt that is run; needed for `"response"` and `"profile"`. Every pass is then the
            whole prompt, with or without response, or one decoding step after it; rows are not padded.
        values: for `"mean"` `[layer head d_head]`, for `"patch"` `[layer pos head d_head]` over the
            edited positions; `record_z` makes both.

    Raises:
        HeadError: a head is outside the model.
        InterventionError: the ablation is not defined for these arguments.

    >>> with ablate(model, HeadSet.parse("L3H1"), positions="all"):
    ...     model("Dear diary,")
    """
    with Edit(row_masks(heads, model.cfg), ablation, window(prompt, positions), values).on(model):
        yield


@contextmanager
def recording_z(model: HookedModel, where: Where = everywhere) -> Iterator[dict[int, Tensor]]:
    """Collect `z` at the chosen positions of the pass inside; layer → `[row pos head d_head]`."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, z: Tensor) -> None:
        chosen = where(z.shape[1])
        if isinstance(chosen, slice):
            found[layer] = z[:, chosen].detach().clone()

    layers = range(model.cfg.n_layers)
    with model.hooks(
        fwd_hooks=[(f"blocks.{layer}.attn.hook_z", partial(_call_with_layer, keep, layer)) for layer in layers]
    ):
        yield found


@torch.inference_mode()
def record_z(
    model: HookedModel, prompt: Any, *, positions: Positions = "response"
) -> Float[Tensor, "layer pos head d_head"]:
    """The z of every head over the edited positions of a prompt with its response.

    Patch with it as it is; its mean over positions is a `values=` for `mean`.
    """
    runner = Runner.of(model)
    with native_attention(model), recording_z(model, window(prompt, positions)) as found:
        runner.logits(prompt.tokens[None].to(runner.device), keep=1)
    if not found:
        raise InterventionError(f"record_z: the prompt has no positions {positions!r}")
    return torch.stack([found[layer][0].cpu() for layer in sorted(found)])
