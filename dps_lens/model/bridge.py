"""`TransformerBridge` (transformer-lens 4): run with the cache objects of Hugging Face, restarted by its blocks."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.errors import ModelCheckError
from dps_lens.model.fast.cache import forget_first, join_rows, preallocated_cache
from dps_lens.model.fast.shared import NotShareableError, may_share, shared_attention, shared_cache
from dps_lens.model.kernels import runs_native
from dps_lens.model.protocol import HookedModel, hf_model_of
from dps_lens.model.runner import PromptCache, Residuals, Runner, recorders
from dps_lens.model.trials import tried

_SHARED_TOKENS = 40


class BridgeRunner(Runner):
    """Runs a `TransformerBridge` with the cache objects of Hugging Face."""

    def __init__(self, model: HookedModel) -> None:
        from transformer_lens.utilities.position_ids import accepts_mask_derived_position_ids

        super().__init__(model)
        self._hf_model = hf_model_of(model)
        self._takes = inspect.signature(self._hf_model.forward).parameters
        self._derives_positions = accepts_mask_derived_position_ids(self._hf_model)

    def _forward(self, tokens: Tensor, *, keep: int | None, **kwargs: Any) -> Tensor:
        if keep is not None and "logits_to_keep" in self._takes:
            kwargs["logits_to_keep"] = keep
        logits = self.model(tokens, return_type="logits", **kwargs)
        return logits if keep is None else logits[:, -keep:]

    @contextmanager
    def _after(self, prompt: PromptCache | None, n_new: int) -> Iterator[dict[str, Any]]:
        """Arguments of a forward pass whose tokens come after a shared prompt."""
        if prompt is None:
            yield {"use_cache": False}
            return
        # With many new tokens a row, the fused kernels win over the copies that they need.
        apart = n_new <= _SHARED_TOKENS and may_share(self.model) and self._shares()
        with shared_attention(self.model) if apart else nullcontext():
            yield {"use_cache": True, "past_key_values": shared_cache(prompt.layers, apart=apart)}

    def _shares(self) -> bool:
        """Whether attending to a shared prompt in place gives this model's own logits; tried once a model."""
        return tried(self.model, "shares", self._try_sharing)

    @property
    def _tolerance(self) -> float:
        """Of logits that should be the same, as a share of their norm."""
        return 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 0.05

    def _try_sharing(self) -> bool:
        tokens = torch.arange(2, 9, device=self.device)[None] % self.cfg.d_vocab
        prompt, logits = self.prefill(tokens[:, :4]), []
        for apart in (False, True):
            past = shared_cache(prompt.layers, apart=apart)
            try:
                with shared_attention(self.model) if apart else nullcontext():
                    logits.append(self._forward(tokens[:, 4:], keep=None, past_key_values=past, use_cache=True).clone())
            except NotShareableError:
                return False
        error = (logits[0].float() - logits[1].float()).norm() / logits[0].float().norm()
        return bool(error < self._tolerance)

    def prefill(
        self,
        tokens: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row all_pos"] | None = None,
        *,
        after: PromptCache | None = None,
    ) -> PromptCache:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for layer, (key, value) in enumerate(after.layers if after else ()):
            cache.update(key, value, layer)
        self._direct(tokens, cache, mask)
        if len(cache.layers) != self.cfg.n_layers:
            raise ModelCheckError(
                f"{type(self._hf_model).__name__} keeps keys and values of {len(cache.layers)} of its "
                f"{self.cfg.n_layers} layers, so a prompt cannot be continued; use another model"
            )
        length = tokens.shape[1] + (after.length if after else 0)
        return PromptCache([(layer.keys, layer.values) for layer in cache.layers], length)

    def logits(
        self,
        tokens: Int[Tensor, "row pos"],
        *,
        prompt: PromptCache | None = None,
        keep: int | None = None,
        record: Residuals | None = None,
    ) -> Float[Tensor, "row kept d_vocab"]:
        with self._after(prompt, tokens.shape[1]) as past, self.model.hooks(fwd_hooks=recorders(record or {})):
            return self._forward(tokens, keep=keep, **past)

    def resume(
        self,
        starts: Mapping[int, Tensor],
        tokens: Int[Tensor, "1 pos"],
        *,
        prompt: PromptCache | None = None,
        keep: int | None = None,
    ) -> Float[Tensor, "row kept d_vocab"]:
        rows = None if self._grows() else sum(len(start) for start in starts.values())
        with self._after(prompt, tokens.shape[1]) as past, _entering(self.model.blocks, starts, rows=rows):
            return self._forward(tokens if rows is None else tokens.expand(rows, -1), keep=keep, **past)

    def _grows(self) -> bool:
        """Whether rows may join from layer to layer; some blocks keep the number of rows that the pass began with."""
        return tried(self.model, f"grows, native {runs_native(self.model)}", self._try_growing)

    def _try_growing(self) -> bool:
        tokens = torch.arange(2, 9, device=self.device)[None] % self.cfg.d_vocab
        prompt, new, middle = self.prefill(tokens[:, :4]), tokens[:, 4:], self.cfg.n_layers // 2
        residuals: Residuals = dict.fromkeys({0, middle})
        whole = self.logits(new, prompt=prompt, record=residuals)
        starts = {layer: residual.expand(2, -1, -1) for layer, residual in sorted(residuals.items())}
        try:
            with self._after(prompt, new.shape[1]) as past, _entering(self.model.blocks, starts):
                joined = self._forward(new, keep=None, **past)
        except Exception:  # whatever a block raises that meets more rows than it was told of
            return False
        error = (joined - whole).float().norm(dim=(-1, -2)).max() / whole.float().norm()
        return bool(error < self._tolerance)

    def block(
        self,
        layer: int,
        residual: Float[Tensor, "row pos d_model"],
        tokens: Int[Tensor, "1 pos"],
        *,
        prompt: PromptCache | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        try:
            with (
                self._after(prompt, tokens.shape[1]) as past,
                _entering(self.model.blocks, {layer: residual}, stop=layer),
            ):
                # Some blocks keep the number of rows that the pass began with.
                self._forward(tokens.expand(len(residual), -1), keep=1, **past)
        except _StoppedError as stopped:
            return stopped.residual
        raise AssertionError(f"block {layer} did not run")

    def start_decoding(self, prompt: PromptCache, rows: Int[Tensor, " row"], room: int = 64) -> Any:
        return preallocated_cache(prompt.layers, rows, room)

    def select(self, cache: Any, rows: Int[Tensor, " row"]) -> None:
        cache.batch_select_indices(rows)

    def join(self, cache: Any, other: Any) -> None:
        join_rows(cache, other)

    def trim(self, cache: Any, positions: int) -> None:
        forget_first(cache, positions)

    def step(
        self, tokens: Int[Tensor, "row pos"], cache: Any, mask: Int[Tensor, "row all_pos"] | None
    ) -> Float[Tensor, "row d_vocab"]:
        return self._direct(tokens, cache, mask)

    def _direct(self, tokens: Tensor, cache: Any, mask: Tensor | None) -> Float[Tensor, "row d_vocab"]:
        """Append `tokens` to a cache; logits of the last position.

        Straight to the Hugging Face model: what the bridge does around a pass costs as much as some layers, and
        leaves notes to components that may stand aside (`BypassedHooks`).
        """
        options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
        if mask is not None and self._derives_positions:
            options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        found = self._hf_model(tokens, past_key_values=cache, attention_mask=mask, use_cache=True, **options)
        return found.logits[:, -1]


def _in_place(residual: Tensor | None, layer: int, starts: Mapping[int, Tensor], rows: int) -> Tensor:
    """The residual stream of all rows, with the values of those that join at this layer."""
    arriving, place = starts[layer], sum(len(start) for one, start in starts.items() if one < layer)
    if residual is None:
        return torch.cat([arriving, arriving[:1].expand(rows - len(arriving), -1, -1)])
    residual = residual.clone()
    residual[place : place + len(arriving)] = arriving.to(residual.device)
    return residual


class _StoppedError(Exception):
    """Carries the residual stream out of a forward pass that ends early."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = residual


@contextmanager
def _entering(
    blocks: Any, starts: Mapping[int, Tensor], *, stop: int | None = None, rows: int | None = None
) -> Iterator[None]:
    """Let blocks below the first start pass their input on, and let rows join at the starts.

    The model around the blocks (masks, position embeddings, final norm, unembedding) stays its own.
    With `stop`, the pass ends after that block by raising `_StoppedError`. With `rows`, the batch has so many from the
    first start on: those that join later are there before, as copies whose values do not count.
    """
    first, last = min(starts), len(blocks) - 1
    changed = [block for layer, block in enumerate(blocks) if layer < first or layer in starts]

    def enter(layer: int, block: Any, *args: Any, **kwargs: Any) -> Any:
        residual = args[0] if args else kwargs.pop("hidden_states")
        if layer < first:
            return starts[first] if layer == last else residual
        arriving = starts[layer]
        if rows is not None:
            arriving = _in_place(residual if layer > first else None, layer, starts, rows)
        elif layer > first:
            arriving = torch.cat([residual, arriving.to(residual.device)])
        leaving = type(block).forward(block, arriving, *args[1:], **kwargs)
        if layer == stop:
            raise _StoppedError(leaving[0] if isinstance(leaving, tuple) else leaving)
        return leaving

    try:
        for layer, block in enumerate(blocks):
            if layer < first or layer in starts:
                # The bridge forwards plain attribute assignment to the wrapped module.
                object.__setattr__(block, "forward", partial(enter, layer, block))
        yield
    finally:
        for block in changed:
            vars(block).pop("forward", None)
