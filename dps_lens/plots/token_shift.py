"""What steering did to each token of a text."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from dps_lens.errors import SteeringError
from dps_lens.plots.painted import painted
from dps_lens.plots.text import plain

if TYPE_CHECKING:
    from dps_lens.steering import Generation


def token_shift(generation: "Generation", row: int = 0, *, title: str | None = None) -> go.Figure:
    """Tokens in reading order, coloured by log p steered − log p full; alternatives on hover.

    Args:
        generation: of `generate`; with `keep_alternatives` the hover names the tokens that were moved most.
        row: which prompt.
        title: of the figure.

    Raises:
        SteeringError: the full model did not run, so that there is no shift.
    """
    shifts, pieces = generation.shifts[row].numpy(), generation.pieces[row]
    if np.isnan(shifts).any():
        raise SteeringError("plots.token_shift: the full model did not run (gamma -1 or 'amplify'); there is no shift")
    kl = float(generation.kl[row].mean())
    return painted(
        shifts.tolist(),
        pieces,
        [_hover(generation, row, step) for step in range(len(pieces))],
        title=title or f"{plain(generation.manifest['rule'])}: shift of each token; mean KL {kl:.3f} nats a step",
        scale="log p steered − full (nats)",
    )


def _hover(generation: "Generation", row: int, step: int) -> str:
    lines = [
        f"<b>{plain(generation.pieces[row][step])}</b>",
        f"shift {float(generation.shifts[row][step]):+.3f}, KL {float(generation.kl[row][step]):.3f} nats",
    ]
    if generation.alternatives:
        lines += [f"{plain(piece)}  {change:+.3f}" for piece, change in generation.alternatives[row][step]]
    return "<br>".join(lines)
