"""Which positions of a pass are edited."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.errors import InterventionError
from dps_lens.literals import POSITIONS, Positions

Selection: TypeAlias = slice | Tensor | None
"""Positions of a pass that are edited: a slice, `Bool[Tensor, "row pos"]`, or None for none."""

Where: TypeAlias = Callable[[int], Selection]
"""Maps the number of positions in a pass to those that are edited."""


def everywhere(n_pos: int) -> Selection:
    """Edit every position of every pass."""
    return slice(None)


def window(prompt: Prompt | None, positions: Positions) -> Where:
    """Which positions of a pass an ablation edits.

    `response` starts at the last prompt token, the position whose logits give the first response
    token; `profile` covers the profile's tokens. A pass of one token is a decoding step after the prompt.

    Raises:
        InterventionError: positions are unknown, or need a prompt that was not given.
    """
    if positions not in POSITIONS:
        raise InterventionError(f"positions {positions!r} are unknown; use one of {', '.join(POSITIONS)}")
    if positions == "all":
        return everywhere
    if prompt is None:
        raise InterventionError(
            f"positions={positions!r} needs prompt=build_prompt(…); without one use positions='all'"
        )
    start, (first, stop) = prompt.spans["response"][0], prompt.spans["profile"]

    def where(n_pos: int) -> Selection:
        if n_pos == 1:
            return slice(None) if positions == "response" else None
        if n_pos < start:
            raise InterventionError(
                f"positions={positions!r}: a pass of {n_pos} tokens is neither the whole prompt of {start} tokens "
                "nor one decoding step after it"
            )
        if positions == "response":
            return slice(start - 1, None)
        return slice(first, stop) if stop > first else None

    return where
