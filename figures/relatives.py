"""Which known heads are the Preference Heads? Jaccard of the found set with every family, beside chance.

python -m figures.relatives --run runs/mechanism
"""

from pathlib import Path

import plotly.graph_objects as go

import dps_lens as dps
from dps_lens import plots
from figures.common import main

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    return plots.overlap(dps.Overlap.load(run / "overlap"))


if __name__ == "__main__":
    main(draw, "relatives", COLUMN, __doc__, Path("runs/mechanism"))
