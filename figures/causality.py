"""Personalisation lost against fluency lost: each line is a family, its points growing K.

python -m figures.causality --run runs/causality
"""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import DASHES, LINES, MARKERS, TEMPLATE
from figures.common import main, read

COLUMN = "acl-wide"


def draw(run: Path) -> go.Figure:
    return losses(read(run, "ablated"), "Personalisation lost against fluency lost")


def losses(frame: pd.DataFrame, title: str) -> go.Figure:
    """Gain that each family takes, over its cost without a profile."""
    figure = go.Figure()
    for number, family in enumerate(dict.fromkeys(frame["family"])):
        own = frame[frame["family"] == family]
        taken, harm = (own[own["measure"] == name] for name in ("gain_removed", "task_cost"))
        figure.add_scatter(
            x=harm["mean"],
            y=taken["mean"],
            text=taken["k"],
            error_y={"array": taken["high"] - taken["mean"], "thickness": 1, "width": 2},
            mode="lines+markers",
            line={"color": LINES[number % len(LINES)], "dash": DASHES[number % len(DASHES)]},
            marker={"symbol": MARKERS[number % len(MARKERS)], "size": 6},
            name=plain(str(family).replace("_", " ")),
            hovertemplate="K = %{text}<br>taken %{y:.3f}, harm %{x:.3f}<extra>" + plain(family) + "</extra>",
        )
    figure.add_hline(y=0, line={"dash": "dot", "color": "#777777"})
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        height=400,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        xaxis={"title": "cost without a profile, nats per token"},
        yaxis={"title": "gain taken, nats per token"},
    )
    return figure


if __name__ == "__main__":
    main(draw, "causality", COLUMN, __doc__, Path("runs/causality"))
