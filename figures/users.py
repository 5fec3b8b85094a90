"""The map of every user, in one scale.

python -m figures.users --run runs/demo
"""

from pathlib import Path

import plotly.graph_objects as go

import dps_lens as dps
from dps_lens import plots
from figures.common import main

COLUMN = "acl-wide"


def draw(run: Path) -> go.Figure:
    return plots.heatmaps(dps.HeadScores.load(run), columns=6)


if __name__ == "__main__":
    main(draw, "users", COLUMN, __doc__)
