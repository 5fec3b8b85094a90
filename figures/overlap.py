"""Do users share heads? Jaccard of their top ten, beside chance and the halves of one user.

python -m figures.overlap --run runs/demo
"""

from pathlib import Path

import plotly.graph_objects as go

import dps_lens as dps
from dps_lens import plots
from figures.common import main

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    return plots.overlap(dps.overlap(dps.HeadScores.load(run)))


if __name__ == "__main__":
    main(draw, "overlap", COLUMN, __doc__)
