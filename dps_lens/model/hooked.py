"""`HookedTransformer` (transformer-lens 3.9): made without weight processing, run with its own caches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.model.fast.cache import joined
from dps_lens.model.runner import PromptCache, Residuals, Runner, recorders


def hooked_transformer(hf_model: Any, tokenizer: Any, source: str, *, device: str, dtype: torch.dtype) -> Any:
    """A `HookedTransformer` with the weights of a Hugging Face model, nothing folded or centred.

    Raises:
        ValueError, AttributeError: transformer-lens does not know the name or the architecture.
    """
    from transformer_lens import HookedTransformer, loading_from_pretrained

    if not Path(source).is_dir():
        return HookedTransformer.from_pretrained_no_processing(
            source, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
        )
    # `from_pretrained` takes official names only; the functions under it read folders.
    cfg = loading_from_pretrained.get_pretrained_model_config(source, fold_ln=False, device=device, dtype=dtype)
    state = loading_from_pretrained.get_pretrained_state_dict(source, cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.to(device)


class HookedRunner(Runner):
    """Runs a `HookedTransformer`.

    Attention masks are always given: left to itself the model takes every token that equals its
    padding token for padding, and end-of-turn markers often do.
    """

    def _cache(self, layers: list[tuple[Tensor, Tensor]], mask: Tensor) -> Any:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
        from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

        entries = [TransformerLensKeyValueCacheEntry(past_keys=key, past_values=value) for key, value in layers]
        return TransformerLensKeyValueCache(entries=entries, previous_attention_mask=mask)

    def _shared(self, prompt: PromptCache | None, rows: int) -> Any:
        if prompt is None:
            return None
        layers = [(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)) for key, value in prompt.layers]
        cache = self._cache(layers, torch.ones(rows, prompt.length, dtype=torch.int, device=self.device))
        cache.freeze()
        return cache

    def prefill(
        self,
        tokens: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row all_pos"] | None = None,
        *,
        after: PromptCache | None = None,
    ) -> PromptCache:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        rows, new = tokens.shape
        before = after.length if after else 0
        mask = tokens.new_ones(rows, before + new) if mask is None else mask
        if after:
            cache = self._cache(after.layers, mask[:, :before])
        else:
            cache = TransformerLensKeyValueCache.init_cache(self.cfg, self.device, rows)
        self.model(tokens, return_type=None, past_kv_cache=cache, attention_mask=mask[:, before:])
        return PromptCache([(entry.past_keys, entry.past_values) for entry in cache.entries], before + new)

    def logits(
        self,
        tokens: Int[Tensor, "row pos"],
        *,
        prompt: PromptCache | None = None,
        keep: int | None = None,
        record: Residuals | None = None,
    ) -> Float[Tensor, "row kept d_vocab"]:
        arguments = {
            "past_kv_cache": self._shared(prompt, tokens.shape[0]),
            "attention_mask": torch.ones_like(tokens),
        }
        hooks = recorders(record) if record is not None else []
        with self.model.hooks(fwd_hooks=hooks):
            logits = self.model(tokens, return_type="logits", **arguments)
        return logits if keep is None else logits[:, -keep:]

    def resume(
        self,
        starts: Mapping[int, Tensor],
        tokens: Int[Tensor, "1 pos"],
        *,
        prompt: PromptCache | None = None,
        keep: int | None = None,
    ) -> Float[Tensor, "row kept d_vocab"]:
        layers = sorted(starts)
        residual = starts[layers[0]][:0]
        for layer, following in zip(layers, [*layers[1:], None], strict=True):
            residual = torch.cat([residual, starts[layer]])
            rows = residual.shape[0]
            seen = tokens.shape[1] + (prompt.length if prompt else 0)
            residual = self.model(
                residual,
                start_at_layer=layer,
                stop_at_layer=following,
                past_kv_cache=self._shared(prompt, rows),
                attention_mask=torch.ones(rows, seen, dtype=torch.int, device=residual.device),
            )
        return residual if keep is None else residual[:, -keep:]

    def block(
        self,
        layer: int,
        residual: Float[Tensor, "row pos d_model"],
        tokens: Int[Tensor, "1 pos"],
        *,
        prompt: PromptCache | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        rows, seen = residual.shape[0], tokens.shape[1] + (prompt.length if prompt else 0)
        return self.model(
            residual,
            start_at_layer=layer,
            stop_at_layer=layer + 1,
            past_kv_cache=self._shared(prompt, rows),
            attention_mask=torch.ones(rows, seen, dtype=torch.int, device=residual.device),
        )

    def start_decoding(self, prompt: PromptCache, rows: Int[Tensor, " row"], room: int = 64) -> Any:
        # The mask of the prompt comes with the first step, which knows the padding.
        layers = [(key[rows], value[rows]) for key, value in prompt.layers]
        return self._cache(layers, torch.ones(len(rows), 0, dtype=torch.int, device=self.device))

    def select(self, cache: Any, rows: Int[Tensor, " row"]) -> None:
        for entry in cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]
        cache.previous_attention_mask = cache.previous_attention_mask[rows]

    def join(self, cache: Any, other: Any) -> None:
        for entry, theirs in zip(cache.entries, other.entries, strict=True):
            entry.past_keys = joined(entry.past_keys, theirs.past_keys, dim=1)
            entry.past_values = joined(entry.past_values, theirs.past_values, dim=1)

    def trim(self, cache: Any, positions: int) -> None:
        for entry in cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[:, positions:], entry.past_values[:, positions:]

    def step(
        self, tokens: Int[Tensor, "row pos"], cache: Any, mask: Int[Tensor, "row all_pos"] | None
    ) -> Float[Tensor, "row d_vocab"]:
        new = tokens.shape[1]
        if mask is None:
            mask = tokens.new_ones(len(tokens), cache.entries[0].past_keys.shape[1] + new)
        cache.previous_attention_mask = mask[:, :-new]
        return self.model(tokens, return_type="logits", past_kv_cache=cache, attention_mask=mask[:, -new:])[:, -1]
