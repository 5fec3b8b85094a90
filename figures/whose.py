"""Whose heads take a user's gain? One's own, another user's, the cluster's, everybody's.

python -m figures.whose --run runs/users
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"
NAMES = {"gain_removed": "gain taken", "task_cost": "cost without profile"}


def draw(run: Path) -> go.Figure:
    frame = read(run, "ablated")
    frame = frame[frame["measure"].isin(NAMES)].assign(measure=lambda rows: rows["measure"].map(NAMES))
    return intervals(
        frame, label="family", group="measure", x="nats per token", title="Whose heads take a user's gain?"
    )


if __name__ == "__main__":
    main(draw, "whose", COLUMN, __doc__, Path("runs/users"))
