"""How far steered texts leave the model's own, for growing K.

python -m figures.k_sweep --run runs/demo
"""

from pathlib import Path

import plotly.graph_objects as go

from dps_lens import plots
from dps_lens.evaluation import SteeringGrid
from figures.common import main

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    return plots.k_sweep(SteeringGrid.load(run / "page" / "grid"), measure="KL")


if __name__ == "__main__":
    main(draw, "k_sweep", COLUMN, __doc__)
