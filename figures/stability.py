"""How many users a stable top ten needs.

python -m figures.stability --run runs/demo
"""

from pathlib import Path

import plotly.graph_objects as go

import dps_lens as dps
from dps_lens import plots
from figures.common import main

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    return plots.stability_curve(dps.stability(dps.HeadScores.load(run)))


if __name__ == "__main__":
    main(draw, "stability", COLUMN, __doc__)
