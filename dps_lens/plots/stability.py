"""How many users, or examples, a stable top-K needs."""

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import TEMPLATE

if TYPE_CHECKING:
    import pandas

BLUE = "#0072B2"


def stability_curve(frame: "pandas.DataFrame", *, units: str = "users", title: str | None = None) -> go.Figure:
    """Overlap of two disjoint sets' top-K against their size, with its chance level.

    Args:
        frame: of `stability`.
        units: what is counted, `"users"` or `"examples"`.
        title: of the figure.
    """
    figure = go.Figure()
    x = list(frame["units"])
    band = {"x": [*x, *x[::-1]], "y": [*frame["high"], *frame["low"][::-1]]}
    figure.add_scatter(
        **band,
        mode="lines",
        fill="toself",
        fillcolor="rgba(0,114,178,0.15)",
        line={"width": 0},
        hoverinfo="skip",
        name="95% of splits",
    )
    figure.add_scatter(
        x=x,
        y=frame["jaccard"],
        customdata=frame[["low", "high"]],
        mode="lines+markers",
        line={"color": BLUE},
        name="overlap",
        hovertemplate="%{x} "
        + plain(units)
        + "<br>Jaccard %{y:.2f} (%{customdata[0]:.2f} to %{customdata[1]:.2f})<extra></extra>",
    )
    figure.add_hline(
        y=float(frame["chance"].iloc[0]), line={"dash": "dot", "color": "#777777"}, annotation_text="chance"
    )
    figure.update_layout(
        template=TEMPLATE,
        title=title or "Do two samples choose the same heads?",
        showlegend=False,
        height=320,
        xaxis={"title": f"{plain(units)} in each of two disjoint samples", "dtick": 1 if len(x) <= 12 else None},
        yaxis={"title": "Jaccard overlap of the top K", "range": [0, 1]},
    )
    return figure
