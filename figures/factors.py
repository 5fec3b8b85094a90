"""Style or topic? What style heads and topic heads take of either gain on held-out documents.

python -m figures.factors --run runs/factors
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"
MEASURES = ("style taken", "style taken, random sets", "topic taken", "topic taken, random sets")


def draw(run: Path) -> go.Figure:
    frame = read(run, "held out")
    frame = frame[frame["measure"].isin(MEASURES)].assign(heads=lambda rows: rows["heads"] + " heads")
    return intervals(frame, label="measure", group="heads", x="nats per token", title="Do style heads spare topic?")


if __name__ == "__main__":
    main(draw, "factors", COLUMN, __doc__, Path("runs/factors"))
