"""Attention heads: one head, and ordered sets of them."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, overload

import torch
from jaxtyping import Bool
from torch import Tensor

from dps_lens.errors import HeadError

_NAME = re.compile(r"L(\d{1,9})H(\d{1,9})", re.IGNORECASE)


class Head(NamedTuple):
    """An attention head, named as in TransformerLens: `str(Head(12, 3)) == "L12H3"`."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, name: str) -> "Head":
        """Read `"L12H3"`.

        Raises:
            HeadError: the name has another form.
        """
        match = _NAME.fullmatch(name.strip())
        if match is None:
            raise HeadError(f"Head.parse: {name[:60]!r} is not a head; write it like 'L12H3'")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class HeadSet:
    """An ordered set of heads with a label, best head first.

    `&`, `|` and `-` keep the order of the left side.

    Attributes:
        heads: the heads.
        label: what the set is called.
        shape: `(n_layers, n_heads)` of the model, where it is known; sets made by `HeadScores.top` know it.

    >>> a = HeadSet.parse("L12H3,L4H0", label="a")
    >>> str(a & HeadSet.parse("L4H0"))
    'L4H0'
    """

    heads: tuple[Head, ...]
    label: str = ""
    shape: tuple[int, int] | None = field(default=None, compare=False)

    def __init__(
        self, heads: Iterable[tuple[int, int]] = (), label: str = "", shape: tuple[int, int] | None = None
    ) -> None:
        unique = dict.fromkeys(Head(int(layer), int(head)) for layer, head in heads)
        object.__setattr__(self, "heads", tuple(unique))
        object.__setattr__(self, "label", label)
        object.__setattr__(self, "shape", shape)

    @classmethod
    def parse(cls, names: str, label: str = "") -> "HeadSet":
        """Read comma- or space-separated names: `"L12H3,L4H0"`."""
        return cls((Head.parse(name) for name in re.split(r"[,\s]+", names.strip()) if name), label)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in self.heads

    @overload
    def __getitem__(self, index: int) -> Head: ...
    @overload
    def __getitem__(self, index: slice) -> "HeadSet": ...
    def __getitem__(self, index: int | slice) -> "Head | HeadSet":
        return HeadSet(self.heads[index], self.label, self.shape) if isinstance(index, slice) else self.heads[index]

    def __str__(self) -> str:
        return ",".join(str(head) for head in self.heads)

    def __and__(self, other: "HeadSet") -> "HeadSet":
        return HeadSet((head for head in self if head in other), self.label, self.shape)

    def __or__(self, other: "HeadSet") -> "HeadSet":
        return HeadSet((*self.heads, *other.heads), self.label, self.shape or other.shape)

    def __sub__(self, other: "HeadSet") -> "HeadSet":
        return HeadSet((head for head in self if head not in other), self.label, self.shape)

    def jaccard(self, other: "HeadSet") -> float:
        """|A ∩ B| / |A ∪ B|; two empty sets are alike (1.0)."""
        union = len(self | other)
        return len(self & other) / union if union else 1.0

    def mask(self, cfg: Any) -> Bool[Tensor, "layer head"]:
        """The set as a mask over the model's heads.

        Args:
            cfg: the model's config; `n_layers` and `n_heads` are read.

        Raises:
            HeadError: a head lies outside the model; the valid range is named.
        """
        mask = torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.bool)
        for head in self:
            if not (0 <= head.layer < cfg.n_layers and 0 <= head.head < cfg.n_heads):
                raise HeadError(
                    f"{head} is not in this model: layers are 0 to {cfg.n_layers - 1}, heads 0 to {cfg.n_heads - 1}"
                )
            mask[head] = True
        return mask


HeadsLike: TypeAlias = HeadSet | Sequence[HeadSet]
"""One set for all rows of a batch, or one set a row."""
