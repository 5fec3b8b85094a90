"""Style against fluency of steered texts, at every γ and K.

python -m figures.pareto --run runs/demo
"""

from pathlib import Path

import plotly.graph_objects as go

from dps_lens import plots
from dps_lens.evaluation import SteeringGrid
from figures.common import main

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    return plots.pareto(SteeringGrid.load(run / "page" / "grid"))


if __name__ == "__main__":
    main(draw, "pareto", COLUMN, __doc__)
