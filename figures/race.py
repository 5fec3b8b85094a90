"""Who steers towards the user? Change of the NLL of the users' own texts by every way of steering, at one KL.

python -m figures.race --run runs/race
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import main, read
from figures.steering import changes

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    frame = read(run, "at KL").rename(columns={"KL": "kl"}).sort_values(["mean", "kl"])
    return changes(frame, "Steering by vectors and contrasts, at matched KL")


if __name__ == "__main__":
    main(draw, "race", COLUMN, __doc__, Path("runs/race"))
