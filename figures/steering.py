"""At the same KL, does steering make the users' own text likelier? Change of the NLL by method.

python -m figures.steering --run runs/steering_kl
"""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    return changes(read(run, "at KL"), "Steering at matched KL")


def changes(frame: pd.DataFrame, title: str) -> go.Figure:
    """Change of the NLL of every method but random heads, by KL."""
    frame = frame.dropna(subset=["mean"])
    frame = frame[~frame["method"].str.contains("random")].assign(group=lambda rows: "KL " + rows["kl"].astype(str))
    return intervals(frame, label="method", group="group", x="change of the NLL, nats per token", title=title)


if __name__ == "__main__":
    main(draw, "steering", COLUMN, __doc__, Path("runs/steering_kl"))
