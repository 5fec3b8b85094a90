"""Style against fluency of steered texts, at every γ and K; ringed: no other setting is better in both. Style is the
similarity to the user's own texts less that to others'; NLL is what the unsteered model makes of a text.

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
