"""A decoding step of fixed shapes, compiled by torch: edits are tensors that go in, not hooks that Python runs.

Keys and values lie in static caches of transformers; masks and positions are made on the device from one counter; all
components of the bridge stand aside.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
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
_SLIDING, _FULL = "sliding_attention", "full_attention"


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
        early: layers whose entering residual stream is given back.
    """

    factors: Float[Tensor, "row layer head"] | None = None
    masks: Bool[Tensor, "row layer head"] | None = None
    source: Int[Tensor, " row"] | None = None
    replace: Callable[[Tensor, Tensor | None], Tensor] | None = None
    values: Float[Tensor, "layer head d_head"] | None = None
    added: Float[Tensor, "row layer head d_head"] | None = None
    residual: Float[Tensor, "row layer d_model"] | None = None
    early: tuple[int, ...] = ()


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

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and positions that there is room for."""
        return len(self.gaps), int(self.cache.layers[0].max_cache_len)

    def select(self, rows: Int[Tensor, " row"]) -> "StepState":
        """These rows, as a batch of their own."""
        layers = [(layer.keys, layer.values) for layer in self.cache.layers]
        left = static_cache(PromptCache(layers, self.shape[1]), len(rows), self.shape[1])
        for layer, (key, value) in zip(left.layers, layers, strict=True):
            layer.keys.copy_(key[rows.to(key.device)])
            layer.values.copy_(value[rows.to(value.device)])
            layer.cumulative_length.copy_(self.position)
        return StepState(left, self.position, self.gaps[rows])


class StepProgram:
    """One decoding step of a model, compiled once for each shape of a batch and kind of edits.

    Made and called inside `native_attention`, on a model without anybody's hooks.

    Args:
        model: a bridge.
        backend: of torch.compile; None runs the step as it stands.
    """

    def __init__(self, model: HookedModel, *, backend: str | None = "inductor") -> None:
        self._model: Any = hf_model_of(model)
        self._blocks = [block.original_component for block in model.blocks]
        self._outs = outs_of(model)
        self._heads = (model.cfg.n_heads, model.cfg.d_head)
        text = self._model.config.get_text_config(decoder=True)
        self._layer_kinds = tuple(getattr(text, "layer_types", None) or ())
        self._window = getattr(text, "sliding_window", None)
        self._kinds = tuple(dict.fromkeys(self._layer_kinds)) or (_FULL if self._window is None else _SLIDING,)
        self._dtype = next(self._model.parameters()).dtype
        self._edits, self._state = StepEdits(), StepState(None, torch.tensor(0), torch.tensor(0))
        self._seen: dict[str, Tensor] = {}
        self._noted: dict[int, Tensor] = {}
        # One function a place for good: torch would compile again for another.
        self._z = [partial(self._edit_z, layer) for layer in range(len(self._outs))]
        self._leaving = [partial(self._add, layer) for layer in range(len(self._outs))]
        self._entering = [partial(self._note, layer) for layer in range(len(self._outs))]
        self._aside = BypassedHooks(model, linears=False)
        self._spare: tuple[tuple[int, int], Any] | None = None
        self._step: Callable[[Tensor], tuple[Tensor, list[Tensor]]] = self._run
        if backend is not None:
            mode = "reduce-overhead" if backend == "inductor" and self.device.type == "cuda" else None
            self._step = torch.compile(self._run, backend=backend, fullgraph=True, dynamic=False, mode=mode)

    @property
    def device(self) -> torch.device:
        """Where the first weights lie."""
        return next(self._model.parameters()).device

    def is_of(self, model: HookedModel) -> bool:
        """Whether the model still has the modules and numbers that this was made of."""
        same = len(self._outs) == len(model.blocks) and all(
            one is other for one, other in zip(self._outs, outs_of(model), strict=True)
        )
        weights = next(self._model.parameters())
        return same and hf_model_of(model) is self._model and weights.dtype == self._dtype

    def __call__(
        self, tokens: Int[Tensor, "row 1"], state: StepState, edits: StepEdits
    ) -> tuple[Float[Tensor, "row d_vocab"], list[Float[Tensor, "row 1 d_model"]]]:
        """Append one token a row; logits, and the residual streams that were asked for."""
        self._state, self._edits = state, edits
        with ExitStack() as stack:
            # All of them, whatever they do this time: torch does not look whether hooks are still those it compiled.
            for layer, (block, out) in enumerate(zip(self._blocks, self._outs, strict=True)):
                stack.callback(out.register_forward_pre_hook(self._z[layer]).remove)
                stack.callback(block.register_forward_pre_hook(self._entering[layer], with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(self._leaving[layer]).remove)
            stack.enter_context(self._aside)
            stack.enter_context(
                torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES)
            )
            try:
                logits, noted = self._step(tokens)
            finally:
                # Nothing of a batch stays with the program.
                self._state, self._edits, self._seen, self._noted = StepState(None, tokens, tokens), StepEdits(), {}, {}
            # A graph on a GPU writes the next step's over these.
            return logits.clone(), [one.clone() for one in noted]

    def _run(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        state = self._state
        places = torch.arange(state.cache.layers[0].max_cache_len, device=tokens.device)
        seen = (places <= state.position)[None] & (places >= state.gaps[:, None])
        near = seen if self._window is None else seen & (places > state.position - self._window)[None]
        self._seen = {kind: near if kind == _SLIDING else seen for kind in self._kinds}
        # To be added, which every attention of transformers knows: some take no masks of truth values.
        least = torch.finfo(self._dtype).min
        masks = {
            kind: torch.zeros_like(one, dtype=self._dtype).masked_fill(~one, least)[:, None, None]
            for kind, one in self._seen.items()
        }
        self._noted = {}
        found = self._model(
            tokens,
            position_ids=(state.position - state.gaps)[:, None],
            attention_mask=masks if self._layer_kinds else masks[self._kinds[0]],
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return found.logits[:, -1].float(), [self._noted[layer] for layer in self._edits.early]

    def _edit_z(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        edits, (flat, *others) = self._edits, args
        z = flat.unflatten(-1, self._heads)
        if edits.factors is not None:
            z = z * edits.factors[:, layer, None, :, None].to(z)
        if edits.masks is not None:
            masks = edits.masks[:, layer, None, :, None].to(z.device)
            z = torch.where(masks, self._replacement(layer, z), z)
        if edits.added is not None:
            z = z + edits.added[:, layer, None].to(z)
        return (z.flatten(-2), *others)

    def _replacement(self, layer: int, z: Tensor) -> Tensor:
        edits = self._edits
        if edits.source is not None:
            return z[edits.source.to(z.device)]
        if edits.replace is None:
            return self._average(layer)
        return edits.replace(z, None if edits.values is None else edits.values[None, None, layer].to(z))

    def _average(self, layer: int) -> Tensor:
        values = self._state.cache.layers[layer].values
        kind = self._layer_kinds[layer] if self._layer_kinds else self._kinds[0]
        seen = self._seen[kind][:, None].to(values.device)
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
            self._noted[layer] = entering[:, -1:]

    def begin(self, prompt: PromptCache, rows: Int[Tensor, " row"], gaps: Int[Tensor, " row"], room: int) -> StepState:
        """A batch whose row i continues row `rows[i]` of the prompts, with room for so many tokens more.

        Lengths are rounded up, so that prompts of about one length are of one shape. The cache of a batch that has
        ended is taken again where it fits: a graph on a GPU knows it by its address.
        """
        length = -(-(prompt.length + room) // _BORDER) * _BORDER
        if self._spare is not None and self._spare[0] == (len(rows), length):
            cache, self._spare = self._spare[1], None
        else:
            self._spare = None  # before anything new is laid out
            cache = static_cache(prompt, len(rows), length)
        for layer, (key, value) in zip(cache.layers, prompt.layers, strict=True):
            for buffer, held in ((layer.keys, key), (layer.values, value)):
                buffer[:, :, : prompt.length] = held[rows.to(held.device)]
                buffer[:, :, prompt.length :].zero_()
            layer.cumulative_length.fill_(prompt.length)
        return StepState(cache, torch.tensor(prompt.length, device=gaps.device), gaps.clone())

    def end(self, state: StepState) -> None:
        """Keep the cache of a batch that has ended for the next one of its shape."""
        self._spare = (state.shape, state.cache)


def outs_of(model: HookedModel) -> list[nn.Module]:
    """The output projection of every layer, as it is in the Hugging Face model."""
    return [block.attn.o.original_component for block in model.blocks]


def static_cache(prompt: PromptCache, rows: int, length: int) -> Any:
    """An empty static cache of transformers for keys and values like those of a prompt."""
    from transformers.cache_utils import Cache, StaticLayer

    layers = []
    for key, value in prompt.layers:
        layer: Any = StaticLayer(max_cache_len=length)
        layer.lazy_initialization(key[:1].expand(rows, -1, -1, -1), value[:1].expand(rows, -1, -1, -1))
        layers.append(layer)
    return Cache(layers=layers)
