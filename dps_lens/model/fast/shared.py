"""One prompt's keys and values for all rows of a batch, without a copy for each row.

Inside native attention, queries of all rows meet the prompt's keys in one matrix product, and their own
row's new keys in another; one softmax joins both. The kernels of torch would need the prompt's keys
and values once a row and, under grouped queries, once a query head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dps_lens.model.fast.switch import is_fast
from dps_lens.model.kernels import attention_configs, runs_native
from dps_lens.model.protocol import HookedModel, hf_model_of

_NAME = "dps_lens_shared"
_UNSUPPORTED = ("softcap", "position_bias", "s_aux", "indices")


class NotShareableError(Exception):
    """This model's attention needs the prompt's keys and values before its own."""


@contextmanager
def shared_attention(model: HookedModel) -> Iterator[None]:
    """Inside, caches of `shared_cache(…, apart=True)` are attended to in place."""
    configs = [config for config in attention_configs(model) if config._attn_implementation == "sdpa"]
    _register()
    for config in configs:
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"


def may_share(model: HookedModel) -> bool:
    """Whether the model's attention goes through the attention functions of Hugging Face, natively, right now."""
    if not is_fast():
        return False
    configs = [config for config in attention_configs(model) if config._attn_implementation == "sdpa"]
    backend = getattr(hf_model_of(model), "_supports_attention_backend", False)
    return bool(configs) and runs_native(model) and bool(backend)


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def shared_cache(layers: list[tuple[Tensor, Tensor]], *, apart: bool) -> Any:
    """A Hugging Face cache that puts one prompt before the rows of any batch and stores nothing.

    Args:
        layers: keys and values of one row.
        apart: inside `shared_attention`: hand the prompt over beside the new keys instead of before them.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class SharedLayer(DynamicLayer):
        keys: Any
        values: Any

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if apart:
                key_states.shared_prompt = self.keys  # type: ignore[attr-defined]
                value_states.shared_prompt = self.values  # type: ignore[attr-defined]
                return key_states, value_states
            return _joined(self.keys, key_states), _joined(self.values, value_states)

    shared: list[Any] = []
    for key, value in layers:
        layer = SharedLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        shared.append(layer)
    return Cache(layers=shared)


def _joined(prompt: Tensor, new: Tensor) -> Tensor:
    return torch.cat([prompt.expand(new.shape[0], -1, -1, -1), new], -2)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` `[row head pos d_head]` to the shared prompt and to its row's `key`, `value`."""
    if any(value is not None for name, value in kwargs.items() if name in _UNSUPPORTED):
        raise NotShareableError
    try:
        old_key, old_value = key.shared_prompt, value.shared_prompt  # type: ignore[attr-defined]
    except AttributeError:
        # The model works on its keys or values after the cache: they are not what the prompt's are.
        raise NotShareableError from None
    rows, n_heads, n_new, d_head = query.shape
    n_kv, n_old, dtype = key.shape[1], old_key.shape[-2], query.dtype
    # 16-bit formats would round the scores before the softmax, which the kernels of torch do not.
    query, key, value, old_key, old_value = (tensor.float() for tensor in (query, key, value, old_key, old_value))
    per_kv = n_heads // n_kv * n_new
    query = (query * (d_head**-0.5 if scaling is None else scaling)).reshape(rows, n_kv, per_kv, d_head)
    together = query.transpose(0, 1).reshape(n_kv, rows * per_kv, d_head)
    to_old = (together @ old_key[0].transpose(-1, -2)).reshape(n_kv, rows, per_kv, n_old).transpose(0, 1)
    scores = torch.cat([to_old, query @ key.transpose(-1, -2)], -1).reshape(rows, n_heads, n_new, n_old + n_new)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = scores.softmax(-1).reshape(rows, n_kv, per_kv, n_old + n_new)
    of_old, of_new = weights.split([n_old, n_new], -1)
    together = of_old.transpose(0, 1).reshape(n_kv, rows * per_kv, n_old) @ old_value[0]
    out = together.reshape(n_kv, rows, per_kv, -1).transpose(0, 1) + of_new @ value
    return out.reshape(rows, n_heads, n_new, -1).transpose(1, 2).to(dtype).contiguous(), None
