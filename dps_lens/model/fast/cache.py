"""A cache with room behind its keys and values: a decoding step writes its own position, in place."""

from functools import cache
from typing import Any

from jaxtyping import Int
from torch import Tensor

from dps_lens.model.fast.switch import is_fast

_ROOM = 64


def preallocated_cache(layers: list[tuple[Tensor, Tensor]], rows: Int[Tensor, " row"], room: int = _ROOM) -> Any:
    """A Hugging Face cache that holds row `rows[i]` of the prompts' keys and values as its row i.

    Args:
        layers: keys and values, `[prompt head pos d_head]`.
        rows: which prompt each row continues.
        room: positions that are written before anything is copied.
    """
    from transformers.cache_utils import Cache, DynamicCache

    if not is_fast():
        plain: Any = DynamicCache()
        for index, (key, value) in enumerate(layers):
            plain.update(key[rows.to(key.device)], value[rows.to(value.device)], index)
        return plain
    layer_class = _layer_class()
    return Cache(
        layers=[layer_class(key[rows.to(key.device)], value[rows.to(value.device)], room) for key, value in layers]
    )


@cache
def _layer_class() -> Any:
    """Made at first use: importing transformers takes seconds."""
    from transformers.cache_utils import DynamicLayer

    # Right because attention reads keys and values through views that end where the last token was written; what lies
    # behind is never looked at.
    class PreallocatedLayer(DynamicLayer):
        keys: Any
        values: Any

        def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self._hold(keys, values, room)

        def _hold(self, keys: Tensor, values: Tensor, room: int) -> None:
            """Move into buffers that leave room for so many positions."""
            length = keys.shape[-2]
            self._buffers = [_with_room(tensor, room) for tensor in (keys, values)]
            self.keys, self.values = (buffer[..., :length, :] for buffer in self._buffers)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            start, new = self.keys.shape[-2], key_states.shape[-2]
            if start + new > self._buffers[0].shape[-2]:
                self._hold(self.keys, self.values, max(_ROOM, new))
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[..., start : start + new, :] = states
            self.keys, self.values = (buffer[..., : start + new, :] for buffer in self._buffers)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            room = self._buffers[0].shape[-2] - self.keys.shape[-2]
            self._hold(self.keys[indices], self.values[indices], room)

    return PreallocatedLayer


def _with_room(tensor: Tensor, room: int) -> Tensor:
    *rows, length, width = tensor.shape
    buffer = tensor.new_empty(*rows, length + room, width)
    buffer[..., :length, :] = tensor
    return buffer
