"""Which finder? Gain over another user removed, and both costs, of every way to choose heads.

python -m figures.finders --run runs/finders
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    frame = read(run, "worth").sort_values("mean", ascending=False).assign(measure="worth")
    title = "Gain over another user removed − neutral cost − ½ task cost"
    return intervals(frame, label="family", group="measure", x="nats per token", title=title)


if __name__ == "__main__":
    main(draw, "finders", COLUMN, __doc__, Path("runs/finders"))
