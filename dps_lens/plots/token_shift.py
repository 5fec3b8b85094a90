"""What steering did to each token of a text."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from dps_lens.errors import SteeringError
from dps_lens.plots.text import plain
from dps_lens.plots.theme import SIGNED, TEMPLATE

if TYPE_CHECKING:
    from dps_lens.steering import Generation

_WIDTH = 12


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
    lines = -(-len(pieces) // _WIDTH)
    limit = max(float(np.abs(shifts).max()), 1e-9)

    def laid_out(values: list, empty: object) -> list[list]:
        padded = [*values, *[empty] * (lines * _WIDTH - len(values))]
        return [padded[start : start + _WIDTH] for start in range(0, len(padded), _WIDTH)]

    hover = [_hover(generation, row, step) for step in range(len(pieces))]
    figure = go.Figure(
        go.Heatmap(
            z=laid_out(shifts.tolist(), None),
            text=laid_out([plain(piece) for piece in pieces], ""),
            customdata=laid_out(hover, ""),
            texttemplate="%{text}",
            zmid=0,
            zmin=-limit,
            zmax=limit,
            colorscale=SIGNED,
            xgap=2,
            ygap=4,
            hoverongaps=False,
            hovertemplate="%{customdata}<extra></extra>",
            colorbar={"title": {"text": "log p steered − full<br>(nats)"}, "thickness": 12},
        )
    )
    kl = float(generation.kl[row].mean())
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{plain(generation.manifest['rule'])}: shift of each token; mean KL {kl:.3f} nats a step",
        height=110 + 44 * lines,
        xaxis={"visible": False},
        yaxis={"visible": False, "autorange": "reversed"},
    )
    return figure


def _hover(generation: "Generation", row: int, step: int) -> str:
    lines = [
        f"<b>{plain(generation.pieces[row][step])}</b>",
        f"shift {float(generation.shifts[row][step]):+.3f}, KL {float(generation.kl[row][step]):.3f} nats",
    ]
    if generation.alternatives:
        lines += [f"{plain(piece)}  {change:+.3f}" for piece, change in generation.alternatives[row][step]]
    return "<br>".join(lines)
