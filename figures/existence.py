"""Is the map sparse? What the top 4% hold of other users' PCS, beside random sets of the same layers.

python -m figures.existence --run runs/existence
"""

from pathlib import Path

import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import DASHES, LINES, TEMPLATE
from figures.common import main, read

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    curve, shares = read(run, "cumulative"), read(run, "share")
    figure = go.Figure()
    for number, row in enumerate(shares.to_dict("records")):
        name, colour, k = str(row["map"]), LINES[number], row["k"] * (0.93, 1.07)[number]
        line = {"color": colour, "dash": DASHES[number]}
        figure.add_scatter(x=curve["rank"], y=curve[name], mode="lines", line=line, name=plain(name))
        figure.add_scatter(
            x=[k],
            y=[row["mean"]],
            error_y={"array": [row["high"] - row["mean"]], "arrayminus": [row["mean"] - row["low"]], "width": 2},
            mode="markers",
            marker={"color": colour, "size": 6},
            showlegend=False,
            hovertemplate="chosen by half of the users, on the others: %{y:.2f}<extra></extra>",
        )
        figure.add_scatter(
            x=[k],
            y=[row["random sets"]],
            mode="markers",
            marker={"color": colour, "size": 6, "symbol": "x-thin", "line": {"width": 2, "color": colour}},
            showlegend=False,
            hovertemplate="random sets: %{y:.2f}<extra></extra>",
        )
    points = {"dots: on other users": "circle", "crosses: random sets": "x-thin"}
    for name, symbol in points.items():
        marker = {"color": "#777777", "symbol": symbol, "line": {"width": 2, "color": "#777777"}}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=name)
    figure.update_layout(
        template=TEMPLATE,
        title="How much of the summed PCS do few heads hold?",
        height=400,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        xaxis={"title": "heads, best first", "type": "log", "dtick": 1},
        yaxis={"title": "share"},
    )
    return figure


if __name__ == "__main__":
    main(draw, "existence", COLUMN, __doc__, Path("runs/existence"))
