"""Can a trait be amplified or held back? Share of capitals under steering with the heads that carry it.

python -m figures.safety --run runs/safety
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    frame = read(run, "capitals")
    label = frame["heads"] + frame["γ"].map({0.0: "", 1.0: ", γ = 1", -1.0: ", masked"})
    frame = frame.assign(label=label, group="capitals")
    return intervals(frame, label="label", group="group", x="share of capitals", title="Can a trait be held back?")


if __name__ == "__main__":
    main(draw, "safety", COLUMN, __doc__, Path("runs/safety"))
