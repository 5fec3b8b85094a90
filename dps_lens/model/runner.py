"""Forward passes: prompt caches, restarts in the middle of the model, and decoding steps.

The one interface through which scoring, validation and steering run a model. Hooks that are active
on the model act in every pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.model.protocol import HookedModel

Residuals = dict[int, Any]
"""Residual stream entering a layer: layer → `Float[Tensor, "row pos d_model"]`."""


@dataclass
class PromptCache:
    """Keys and values of a prompt, one `(key, value)` pair a layer, never written after prefill.

    Attributes:
        layers: tensors in the layout of the library that made them.
        length: positions held.
    """

    layers: list[tuple[Tensor, Tensor]]
    length: int


class Runner(ABC):
    """Runs one hooked model; `runner_of(model)` picks the implementation."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.cfg = model.cfg

    @property
    def device(self) -> torch.device:
        """Where token ids go in; weights that wait on a disk are no place."""
        places = (parameter.device for parameter in self.model.parameters())
        return next((place for place in places if place.type != "meta"), torch.device("cpu"))

    @abstractmethod
    def prefill(
        self,
        tokens: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row all_pos"] | None = None,
        *,
        after: PromptCache | None = None,
    ) -> PromptCache:
        """Run a prompt and keep its keys and values.

        Args:
            tokens: token ids.
            mask: 1 where a position, cached or new, is a token; 0 where it is padding.
            after: keys and values of the positions before, of the same rows; they are in what is returned.
        """

    @abstractmethod
    def logits(
        self,
        tokens: Int[Tensor, "row pos"],
        *,
        prompt: PromptCache | None = None,
        keep: int | None = None,
        record: Residuals | None = None,
    ) -> Float[Tensor, "row kept d_vocab"]:
        """Logits of `tokens`, placed after `prompt`, which is shared by all rows and left as it is.

        Args:
            tokens: token ids.
            prompt: keys and values of one row that every row of `tokens` continues.
            keep: return the logits of the last `keep` positions only.
            record: filled with the residual stream entering each layer that it holds as a key.
        """

    @abstractmethod
    def resume(
        self,
        starts: Mapping[int, Tensor],
        tokens: Int[Tensor, "1 pos"],
        *,
        prompt: PromptCache | None = None,
        keep: int | None = None,
    ) -> Float[Tensor, "row kept d_vocab"]:
        """Restart rows in the middle of the model; layers below the first start are not computed.

        Args:
            starts: layer → residual stream of the rows that enter there. Rows join in layer order,
                so the batch grows from layer to layer.
            tokens: the ids at these positions (for positions and masks).
            prompt: as in `logits`.
            keep: as in `logits`.

        Returns:
            logits of all rows, in the order in which they joined. A start at `n_layers` enters after
            the last block.
        """

    @abstractmethod
    def block(
        self,
        layer: int,
        residual: Float[Tensor, "row pos d_model"],
        tokens: Int[Tensor, "1 pos"],
        *,
        prompt: PromptCache | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """One block alone; gradients flow through it."""

    @abstractmethod
    def start_decoding(self, prompt: PromptCache, rows: Int[Tensor, " row"], room: int = 64) -> Any:
        """A growing cache that holds row `rows[i]` of `prompt` as its row i, with room for so many tokens more."""

    @abstractmethod
    def select(self, cache: Any, rows: Int[Tensor, " row"]) -> None:
        """Keep these rows of a growing cache, in place."""

    @abstractmethod
    def join(self, cache: Any, other: Any) -> None:
        """Add the rows of another growing cache behind those of `cache`, in place; all end at the same position, and
        what the shorter ones have before their first position is masked out."""

    @abstractmethod
    def trim(self, cache: Any, positions: int) -> None:
        """Forget so many first positions of a growing cache, in place."""

    @abstractmethod
    def step(
        self, tokens: Int[Tensor, "row pos"], cache: Any, mask: Int[Tensor, "row all_pos"] | None
    ) -> Float[Tensor, "row d_vocab"]:
        """Append `tokens` to a growing cache; logits of the last position.

        Args:
            tokens: token ids, one row a sequence.
            cache: from `start_decoding`; extended in place.
            mask: 1 where a position, cached or new, is a token; 0 where it is padding; None where there is none.
        """


def recorders(record: Residuals) -> list[tuple[str, Any]]:
    """Hooks that fill `record` with the residual stream entering each layer that it holds as a key."""

    def keep(residual: Tensor, hook: object, layer: int) -> None:
        record[layer] = residual.detach()

    return [(f"blocks.{layer}.hook_resid_pre", partial(keep, layer=layer)) for layer in record]
