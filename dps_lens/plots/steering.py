"""Rules of steering at every strength: what they do to the users' own text, against how hard they steer."""

from itertools import cycle
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import DASHES, LINES, MARKERS, TEMPLATE

if TYPE_CHECKING:
    from dps_lens.evaluation.sweep import SteeringSweep

_GREY, _LEAST = "#999999", 1e-3


def steering(sweep: "SteeringSweep", *, max_kl: float = 0.5, title: str | None = None) -> go.Figure:
    """One line a method, one marker a strength: lower is better, further right is harder steering.

    Random heads are grey, with the dashes and markers of the heads that they control for. Bars are 95%
    intervals over users.

    Args:
        sweep: of `steering_sweep`.
        max_kl: strengths that steer harder than this are left out, as are those under 0.001 nats per token.
        title: of the figure.
    """
    frame, figure = sweep.to_frame(), go.Figure()
    real = [name for name in sweep.methods if not name.endswith(" (random)")]
    styles = {name: style for name, *style in zip(real, cycle(LINES), cycle(DASHES[:-1]), cycle(MARKERS), strict=False)}
    for name in sweep.methods:
        of = name.removesuffix(" (random)")
        colour, dash, marker = styles.get(name, (_GREY, *styles[of][1:]))
        rows = frame[(frame["method"] == name) & frame["kl"].between(_LEAST, max_kl)]
        figure.add_scatter(
            x=rows["kl"],
            y=rows["mean"],
            error_y={"array": rows["high"] - rows["mean"], "thickness": 1, "width": 2},
            customdata=rows[["strength", "low", "high"]],
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2 if name == of else 1},
            marker={"symbol": marker, "size": 7 if name == of else 5},
            legendgroup=of,
            showlegend=name == of,
            name=plain(name),
            hovertemplate="<b>" + plain(name) + "</b>, strength %{customdata[0]:g}<br>"
            "%{y:.3f} (%{customdata[1]:.3f} to %{customdata[2]:.3f}) at KL %{x:.3f}<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": "#cccccc", "width": 1})
    unit = sweep.manifest.get("unit", "nats per token")
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{sweep.loss} of the users' own text against how hard each rule steers; grey: random heads",
        height=460,
        xaxis={"title": "KL(steered ‖ full), nats per token", "type": "log", "dtick": "D2"},
        yaxis={"title": f"change of {sweep.loss}, {unit}"},
    )
    return figure
