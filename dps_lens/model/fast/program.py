"""A decoding step of fixed shapes, compiled by torch: edits are tensors that go in, not hooks that Python runs.

Keys and values lie in static caches of transformers; masks and positions are made on the device from one counter; all
components of the bridge stand aside.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dps_lens.model.fast.bypass import BypassedHooks
from dps_lens.model.protocol import HookedModel, hf_model_of
from dps_lens.model.runner import PromptCache

_BORDER = 256
_SHAPES = 256


@dataclass(eq=False)
class StepEdits:
    """What a step does to activations; all tensors are read anew at every step.

    Attributes:
        factors: `Float[Tensor, "row layer head"]`, what z is multiplied by.
        masks: `Bool[Tensor, "row layer head"]`, where z is replaced.
        source: `Int[Tensor, "row"]`: by the z of these rows.
        replace: `(z, values) → z`: by what this makes; without it and `source`, by the mean of the values that a head
            sees.
        values: `Float[Tensor, "layer head d_head"]`, of `replace`.
        added: `Float[Tensor, "row layer head d_head"]`, what is added to z at last.
        residual: `Float[Tensor, "row layer d_model"]`, what is added to the residual stream that leaves a layer.
        early: by layer, `Float[Tensor, "row 1 d_model"]`, where the residual stream that enters it is written.
    """

    factors: Float[Tensor, "row layer head"] | None = None
    masks: Bool[Tensor, "row layer head"] | None = None
    source: Int[Tensor, " row"] | None = None
    replace: Callable[[Tensor, Tensor | None], Tensor] | None = None
    values: Float[Tensor, "layer head d_head"] | None = None
    added: Float[Tensor, "row layer head d_head"] | None = None
    residual: Float[Tensor, "row layer d_model"] | None = None
    early: Mapping[int, Float[Tensor, "row 1 d_model"]] = field(default_factory=dict)


@dataclass(eq=False)
class StepState:
    """The batch that a program runs.

    Attributes:
        cache: a static cache of transformers.
        position: `Int[Tensor, ""]`, where the next token is written.
        gaps: `Int[Tensor, "row"]`, padding in front of each row.
    """

    cache: Any
    position: Tensor
    gaps: Tensor

    def select(self, rows: Int[Tensor, " row"]) -> "StepState":
        """These rows, as a batch of their own."""
        prompt = PromptCache(
            [(layer.keys, layer.values) for layer in self.cache.layers], self.cache.layers[0].max_cache_len
        )
        left = static_state(prompt, rows, self.gaps[rows], 0)
        for layer in left.cache.layers:
            layer.cumulative_length.copy_(self.position)
        return StepState(left.cache, self.position, left.gaps)


class StepProgram:
    """One decoding step of a model, compiled once for each shape of a batch and kind of edits.

    Args:
        model: a bridge.
        compiled: compile it; else it runs as it stands.
    """

    def __init__(self, model: HookedModel, *, compiled: bool = True) -> None:
        self._model: Any = hf_model_of(model)
        self._blocks = [block.original_component for block in model.blocks]
        self._outs: list[nn.Module] = [block.attn.o.original_component for block in model.blocks]
        self._heads = (model.cfg.n_heads, model.cfg.d_head)
        text = self._model.config.get_text_config(decoder=True)
        self._layer_kinds = tuple(getattr(text, "layer_types", None) or ())
        self._kinds = tuple(dict.fromkeys(self._layer_kinds))
        self._window = getattr(text, "sliding_window", None)
        self._edits, self._state = StepEdits(), StepState(None, torch.tensor(0), torch.tensor(0))
        self._seen: dict[str, Tensor] = {}
        self._dtype = next(self._model.parameters()).dtype
        # One function a place for good: torch would compile again for another.
        self._z = [partial(self._edit_z, layer) for layer in range(len(self._outs))]
        self._leaving = [partial(self._add, layer) for layer in range(len(self._outs))]
        self._entering = [partial(self._note, layer) for layer in range(len(self._outs))]
        self._aside = BypassedHooks(model, linears=False)
        self._step = self._run
        if compiled:
            device = next(self._model.parameters()).device.type
            mode = "reduce-overhead" if device == "cuda" else "default"
            self._step = torch.compile(self._run, fullgraph=True, dynamic=False, mode=mode)

    def __call__(
        self, tokens: Int[Tensor, "row 1"], state: StepState, edits: StepEdits
    ) -> Float[Tensor, "row d_vocab"]:
        """Append one token a row; logits."""
        self._state, self._edits = state, edits
        # All of them, whatever they do this time: torch does not look whether hooks are still those that it compiled.
        handles = [out.register_forward_pre_hook(hook) for out, hook in zip(self._outs, self._z, strict=True)]
        for block, entering, leaving in zip(self._blocks, self._entering, self._leaving, strict=True):
            handles.append(block.register_forward_pre_hook(entering, with_kwargs=True))
            handles.append(block.register_forward_hook(leaving))
        try:
            with self._aside, torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES):
                logits: Tensor = self._step(tokens)
                # A graph on a GPU writes the next step's over these.
                return logits.clone()
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, tokens: Tensor) -> Tensor:
        state = self._state
        length = state.cache.layers[0].max_cache_len
        places = torch.arange(length, device=tokens.device)
        seen = (places <= state.position)[None] & (places >= state.gaps[:, None])
        near = seen if self._window is None else seen & (places > state.position - self._window)[None]
        kinds = self._kinds or ("sliding_attention" if self._window is not None else "full_attention",)
        self._seen = {kind: near if kind == "sliding_attention" else seen for kind in kinds}
        # To be added, which every attention of transformers knows: some take no masks of truth values.
        least = torch.finfo(self._dtype).min
        masks = {
            kind: torch.zeros_like(one, dtype=self._dtype).masked_fill(~one, least)[:, None, None]
            for kind, one in self._seen.items()
        }
        found = self._model(
            tokens,
            position_ids=(state.position - state.gaps)[:, None],
            attention_mask=masks if self._kinds else masks[kinds[0]],
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return found.logits[:, -1].float()

    def _edit_z(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        edits, (flat, *others) = self._edits, args
        z = flat.unflatten(-1, self._heads)
        if edits.factors is not None:
            z = z * edits.factors[:, layer, None, :, None].to(z)
        if edits.masks is not None:
            z = torch.where(edits.masks[:, layer, None, :, None], self._replacement(layer, z), z)
        if edits.added is not None:
            z = z + edits.added[:, layer, None].to(z)
        return (z.flatten(-2), *others)

    def _replacement(self, layer: int, z: Tensor) -> Tensor:
        edits = self._edits
        if edits.source is not None:
            return z[edits.source]
        if edits.replace is None:
            return self._average(layer)
        return edits.replace(z, None if edits.values is None else edits.values[None, None, layer].to(z))

    def _average(self, layer: int) -> Tensor:
        values = self._state.cache.layers[layer].values
        kind = self._layer_kinds[layer] if self._layer_kinds else next(iter(self._seen))
        seen = self._seen[kind][:, None]
        share = seen.to(values) / seen.sum(-1, keepdim=True)
        mean = share[:, None] @ values
        return mean.repeat_interleave(self._heads[0] // values.shape[1], 1).transpose(1, 2)

    def _add(self, layer: int, module: nn.Module, args: object, output: Any) -> Any:
        if self._edits.residual is None:
            return output
        left = output[0] if isinstance(output, tuple) else output
        left = left + self._edits.residual[:, layer, None].to(left)
        return (left, *output[1:]) if isinstance(output, tuple) else left

    def _note(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer in self._edits.early:
            entering = args[0] if args else kwargs["hidden_states"]
            self._edits.early[layer].copy_(entering[:, -1:])


def static_state(prompt: PromptCache, rows: Int[Tensor, " row"], gaps: Int[Tensor, " row"], room: int) -> StepState:
    """A static cache that holds row `rows[i]` of the prompts as its row i, with room for so many tokens more.

    Lengths are rounded up, so that prompts of about one length are of one shape.
    """
    from transformers.cache_utils import Cache, StaticLayer

    length = -(-(prompt.length + room) // _BORDER) * _BORDER
    layers = []
    for key, value in prompt.layers:
        layer: Any = StaticLayer(max_cache_len=length)
        layer.lazy_initialization(key[:1].expand(len(rows), -1, -1, -1), value[:1].expand(len(rows), -1, -1, -1))
        layer.keys[:, :, : prompt.length] = key[rows.to(key.device)]
        layer.values[:, :, : prompt.length] = value[rows.to(value.device)]
        layer.cumulative_length.fill_(prompt.length)
        layers.append(layer)
    return StepState(Cache(layers=layers), torch.tensor(prompt.length, device=gaps.device), gaps.clone())
