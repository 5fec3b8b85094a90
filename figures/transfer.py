"""What carries over: overlap of top heads across domains and time, beside random sets.

python -m figures.transfer --run runs/transfer
"""

from pathlib import Path

import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import LINES, MARKERS, TEMPLATE
from figures.common import main, read

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    frame, figure = read(run, "overlap"), go.Figure()
    for number, column in enumerate(("jaccard", "random sets", "rank correlation")):
        figure.add_scatter(
            x=frame[column],
            y=list(map(plain, frame["compared"])),
            mode="markers",
            marker={"color": LINES[number], "symbol": MARKERS[number], "size": 8},
            name=column,
        )
    figure.update_layout(
        template=TEMPLATE,
        title="Do top heads carry over?",
        height=260,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        xaxis={"title": "overlap of the top heads, correlation of maps", "range": [-0.05, 1]},
        yaxis={"autorange": "reversed"},
    )
    return figure


if __name__ == "__main__":
    main(draw, "transfer", COLUMN, __doc__, Path("runs/transfer"))
