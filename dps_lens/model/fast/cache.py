"""A cache with room behind its keys and values: a decoding step writes its own position, in place."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.model.fast.switch import is_fast

_ROOM, _MORE_ROWS = 64, 8


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

    # Right because attention reads keys and values through views of the rows that there are, up to where the last token
    # was written; what lies around them is never looked at.
    class PreallocatedLayer(DynamicLayer):
        keys: Any
        values: Any

        def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
            super().__init__()
            self.lazy_initialization(keys, values)
            self._hold(keys, values, room)

        def _hold(self, keys: Tensor, values: Tensor, room: int, *, before: int = 0, rows: int = 0) -> None:
            """Move into buffers that leave room for so many positions behind and before, and for more rows."""
            self._start, self._stop = before, before + keys.shape[-2]
            self._buffers = [_with_room(tensor, room, before, rows) for tensor in (keys, values)]
            self._look(len(keys))

        def _look(self, rows: int) -> None:
            self.keys, self.values = (buffer[:rows, :, self._start : self._stop] for buffer in self._buffers)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            new, rows = key_states.shape[-2], len(self.keys)
            if self._stop + new > self._buffers[0].shape[-2]:
                self._hold(self.keys, self.values, max(_ROOM, new))
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:rows, :, self._stop : self._stop + new] = states
            self._stop += new
            self._look(rows)
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            chosen = indices.tolist()
            moves = [(to, row) for to, row in enumerate(chosen) if to != row]
            if all(row >= len(chosen) for _, row in moves):
                # Rows from behind take the places of those that leave.
                for buffer in self._buffers:
                    for to, row in moves:
                        buffer[to] = buffer[row]
                self._look(len(chosen))
                return
            chosen_rows = indices.to(self.keys.device)
            self._hold(self.keys[chosen_rows], self.values[chosen_rows], self._buffers[0].shape[-2] - self._stop)

        def join(self, keys: Tensor, values: Tensor) -> None:
            """More rows, which end where those that are there do."""
            rows, new, length = len(self.keys), len(keys), keys.shape[-2]
            missing = max(0, length - (self._stop - self._start))
            if rows + new > len(self._buffers[0]) or missing > self._start:
                room = max(_ROOM, self._buffers[0].shape[-2] - self._stop)
                self._hold(self.keys, self.values, room, before=missing, rows=max(_MORE_ROWS, new))
            before, self._start = self._start, self._start - missing
            for buffer, states in zip(self._buffers, (keys, values), strict=True):
                # Masked out, and yet no NaN may stand there: the weights of what is masked out are 0 times it.
                buffer[:rows, :, self._start : before] = 0
                buffer[rows : rows + new, :, self._start : self._stop - length] = 0
                buffer[rows : rows + new, :, self._stop - length : self._stop] = states
            self._look(rows + new)

        def trim(self, positions: int) -> None:
            """Forget the first positions."""
            self._start += positions
            self._look(len(self.keys))

    return PreallocatedLayer


def join_rows(cache: Any, other: Any) -> None:
    """Add the rows of another cache behind those of `cache`; all end at the same position."""
    for layer, theirs in zip(cache.layers, other.layers, strict=True):
        if hasattr(layer, "join"):
            layer.join(theirs.keys, theirs.values)
        else:
            layer.keys, layer.values = (
                joined(ours, more, dim=-2) for ours, more in ((layer.keys, theirs.keys), (layer.values, theirs.values))
            )


def forget_first(cache: Any, positions: int) -> None:
    """Forget the first positions of a cache."""
    for layer in cache.layers:
        if hasattr(layer, "trim"):
            layer.trim(positions)
        else:
            layer.keys, layer.values = layer.keys[..., positions:, :], layer.values[..., positions:, :]


def joined(ours: Tensor, theirs: Tensor, *, dim: int) -> Tensor:
    """Rows below each other, with zeros where one has fewer positions, along `dim`, than the other."""
    length = max(ours.shape[dim], theirs.shape[dim])
    return torch.cat([_padded(ours, length, dim), _padded(theirs, length, dim)])


def _padded(tensor: Tensor, length: int, dim: int) -> Tensor:
    size = [*tensor.shape]
    size[dim] = length - size[dim]
    return torch.cat([tensor.new_zeros(size), tensor], dim=dim)


def _with_room(tensor: Tensor, room: int, before: int, more: int) -> Tensor:
    rows, heads, length, width = tensor.shape
    buffer = tensor.new_empty(rows + more, heads, before + length + room, width)
    buffer[:rows, :, before : before + length] = tensor
    return buffer
