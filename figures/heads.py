"""Where the profile is read: the mean map of all users, its top heads outlined, heads of the population dotted.

python -m figures.heads --run runs/demo
"""

from pathlib import Path

import plotly.graph_objects as go

import dps_lens as dps
from dps_lens import plots
from figures.common import main

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    scores = dps.HeadScores.load(run)
    return plots.heatmap(
        scores, heads=scores.top(10, label="top 10"), significance=dps.significant_heads(scores), fade=True
    )


if __name__ == "__main__":
    main(draw, "heads", COLUMN, __doc__)
