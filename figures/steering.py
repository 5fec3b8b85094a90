"""At the same KL, does steering make the users' own text likelier? Change of the NLL by method.

python -m figures.steering --run runs/steering_kl
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    frame = read(run, "at KL").dropna(subset=["mean"])
    frame = frame[~frame["method"].str.contains("random")].assign(group=lambda rows: "KL " + rows["kl"].astype(str))
    return intervals(
        frame, label="method", group="group", x="change of the NLL, nats per token", title="Steering at matched KL"
    )


if __name__ == "__main__":
    main(draw, "steering", COLUMN, __doc__, Path("runs/steering_kl"))
