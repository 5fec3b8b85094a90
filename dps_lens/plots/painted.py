"""A text whose tokens are coloured by a number each."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import SIGNED, TEMPLATE

_WIDTH = 12


def painted(
    values: Sequence[float], pieces: Sequence[str], hover: Sequence[str], *, title: str, scale: str
) -> go.Figure:
    """Tokens in reading order, blue above 0 and red below.

    Args:
        values: of the tokens.
        pieces: their texts, as they are.
        hover: what each says, ready to be shown.
        title: of the figure, ready to be shown.
        scale: of the colour bar.
    """
    lines = -(-len(pieces) // _WIDTH)
    limit = max(float(np.abs(np.asarray(values)).max(initial=0.0)), 1e-9)

    def laid_out(given: Sequence[Any], empty: object) -> list[list[Any]]:
        padded = [*given, *[empty] * (lines * _WIDTH - len(given))]
        return [padded[start : start + _WIDTH] for start in range(0, len(padded), _WIDTH)]

    figure = go.Figure(
        go.Heatmap(
            z=laid_out([float(value) for value in values], None),
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
            colorbar={
                "title": {"text": scale, "side": "top"},
                "orientation": "h",
                "thickness": 10,
                "len": 0.4,
                "x": 0,
                "xanchor": "left",
                "y": 0,
                "yanchor": "top",
                "nticks": 5,
            },
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=150 + 44 * lines,
        margin={"b": 64},
        xaxis={"visible": False},
        yaxis={"visible": False, "autorange": "reversed"},
    )
    return figure
