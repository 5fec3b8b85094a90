"""How much history, and how clean? The gain and what heads take of it, by items in the profile.

python -m figures.samples --run runs/samples
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"
MEASURES = ("gain", "gain_removed", "gain_removed, random sets")


def draw(run: Path) -> go.Figure:
    frame = read(run, "levels")
    frame = frame[frame["measure"].isin(MEASURES)]
    return intervals(
        frame, label="level", group="measure", x="nats per token", title="What is a profile worth, and to which heads?"
    )


if __name__ == "__main__":
    main(draw, "samples", COLUMN, __doc__, Path("runs/samples"))
