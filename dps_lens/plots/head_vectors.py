"""Cosines of users' head vectors, with what they are by chance."""

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import SIGNED, TEMPLATE

if TYPE_CHECKING:
    from dps_lens.vectors import HeadVectors

_BLANK = "#dddddd"


def head_vectors(vectors: "HeadVectors", *, title: str | None = None, **options: Any) -> go.Figure:
    """The cosine of every two users' vectors, the range by chance on hover.

    Args:
        vectors: of `dps_lens.head_vectors`, of two users or more.
        title: by default what is compared.
        options: of `HeadVectors.cosines`.

    Returns:
        a figure with one heatmap trace from −1 to 1, the diagonal blank.
    """
    frame = vectors.cosines(**options)
    names = list(vectors.users)
    place = {user: index for index, user in enumerate(names)}
    columns = ["cosine", "null_low", "null_high"]
    table = np.full((len(names), len(names), 3), np.nan)
    for row in frame.to_dict("records"):
        a, b = place[row["user"]], place[row["other"]]
        table[a, b] = table[b, a] = [row[name] for name in columns]
    shown = [plain(name) for name in names]
    figure = go.Figure(
        go.Heatmap(
            z=table[:, :, 0],
            x=shown,
            y=shown,
            customdata=table[:, :, 1:],
            zmin=-1,
            zmax=1,
            colorscale=SIGNED,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            colorbar={"title": {"text": "cosine"}, "thickness": 12},
            hovertemplate=(
                "<b>%{y}</b> and <b>%{x}</b><br>cosine %{z:.2f}<br>by chance %{customdata[0]:.2f} to "
                "%{customdata[1]:.2f}<extra></extra>"
            ),
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"Vectors of {len(vectors.heads)} heads: {len(names)} users",
        height=max(320, 110 + 18 * len(names)),
        plot_bgcolor=_BLANK,
        # Names may be numbers, which plotly would place on a scale.
        xaxis={"type": "category", "tickangle": -45, "automargin": True},
        yaxis={"type": "category", "autorange": "reversed", "automargin": True},
    )
    return figure
