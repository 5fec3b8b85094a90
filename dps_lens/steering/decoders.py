"""Rows that may not share a pass, decoded as if they did."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dps_lens.model import HookedModel
from dps_lens.model.positions import is_long
from dps_lens.steering.compiled import CompiledDecoder
from dps_lens.steering.decoder import Decoder, Row


def decoder_of(
    model: HookedModel, rows: Sequence[Row], *, compiled: bool = False, **options: Any
) -> "Decoder | Decoders":
    """One decoder where all rows may share a pass; `options` as of `Decoder`, or of `CompiledDecoder`.

    Rows on both sides of a length at which the model's rotary factors change may not: a batch takes those of its
    longest row.
    """
    groups = [[row for row in rows if is_long(model, len(row.tokens) - 1) is side] for side in (False, True)]
    kind = CompiledDecoder if compiled else Decoder
    parts = [kind(model, group, **options) for group in groups if group]
    return parts[0] if len(parts) == 1 else Decoders(parts)


class Decoders:
    """Several decoders as one: their rows one after the other; see `Decoder`."""

    def __init__(self, parts: Sequence[Decoder]) -> None:
        self._parts = list(parts)

    @property
    def rows(self) -> list[Row]:
        """Those that still run."""
        return [row for part in self._parts for row in part.rows]

    @property
    def device(self) -> torch.device:
        """Where ids of tokens go in."""
        return self._parts[0].device

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Each part is on the model only while it computes: edits of one are not for the rows of another."""

    def step(
        self, tokens: Int[Tensor, " row"] | None = None
    ) -> tuple[Float[Tensor, "row d_vocab"], Float[Tensor, "layer row d_vocab"]]:
        """Logits after one more token a row, and those read off early layers."""
        sizes = [len(part.rows) for part in self._parts]
        pieces: Sequence[Tensor | None] = [None] * len(sizes) if tokens is None else tokens.split(sizes)
        found = []
        for part, piece in zip(self._parts, pieces, strict=True):
            with part:
                found.append(part.step(piece))
        logits, early = zip(*found, strict=True)
        return torch.cat(logits), torch.cat(early, dim=1)

    def keep(self, rows: Bool[Tensor, " row"]) -> None:
        """Let the other rows leave the batch."""
        pieces = rows.split([len(part.rows) for part in self._parts])
        staying = [(part, piece) for part, piece in zip(self._parts, pieces, strict=True) if piece.any()]
        for part, piece in staying:
            with part:
                part.keep(piece)
        self._parts = [part for part, _ in staying]
