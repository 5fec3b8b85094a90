"""What choices of a detector make: gain taken by true heads and output slices, chosen on older or tested posts.

python -m figures.artefact --run runs/artefact
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    frame = read(run, "ablated")
    frame = frame[frame["measure"].isin(("gain_removed", "task_cost"))]
    return intervals(
        frame, label="family", group="measure", x="nats per token", title="How much can a detector's choices make?"
    )


if __name__ == "__main__":
    main(draw, "artefact", COLUMN, __doc__, Path("runs/artefact"))
