"""Who steers towards the user? Change of the NLL of the users' own texts against how hard each way of steering steers.

python -m figures.race --run runs/race
"""

from pathlib import Path

import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import LINES, MARKERS, TEMPLATE
from figures.common import main, read

COLUMN = "acl"
SHOWN = ("cad", "dola", "dps", "dps-patch", "amplify", "head_vector", "stylevector")
CONTROL = ", another user's"


def draw(run: Path) -> go.Figure:
    """One line a method, where it reaches the KL, dashed with another user's vector; bars are 95% over users."""
    frame, figure = read(run, "at KL").dropna(subset=["mean"]), go.Figure()
    lines = [(number, name) for number, one in enumerate(SHOWN) for name in (one, one + CONTROL)]
    lines = [(number, name) for number, name in lines if name in {*frame["method"]}]
    for number, name in lines:
        rows = frame[frame["method"] == name]
        figure.add_scatter(
            x=rows["KL"].map("{:g}".format),
            offsetgroup=name,
            y=rows["mean"],
            error_y={
                "array": rows["high"] - rows["mean"],
                "arrayminus": rows["mean"] - rows["low"],
                "width": 0,
                "thickness": 1,
            },
            name=plain(name),
            mode="lines+markers",
            line={"color": LINES[number], "width": 1.5, "dash": "dot" if name.endswith(CONTROL) else "solid"},
            marker={"symbol": MARKERS[number % len(MARKERS)], "size": 7},
        )
    figure.add_hline(y=0, line={"dash": "dot", "color": "#777777"})
    figure.update_layout(
        template=TEMPLATE,
        title="Steering by vectors and contrasts",
        height=420,
        # Beside each other, so that no bar hides another.
        scattermode="group",
        scattergap=0.5,
        xaxis={"type": "category", "title": "KL(steered ‖ full), nats per token"},
        yaxis={"title": "change of the NLL of the own text, nats per token"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


if __name__ == "__main__":
    main(draw, "race", COLUMN, __doc__, Path("runs/race"))
