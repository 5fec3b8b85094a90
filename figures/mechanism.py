"""Who feeds the Preference Heads? The paths that survive, from documents to the logits.

python -m figures.mechanism --run runs/mechanism
"""

from pathlib import Path

import plotly.graph_objects as go

import dps_lens as dps
from figures.common import main

COLUMN = "acl-wide"


def draw(run: Path) -> go.Figure:
    return dps.PathEffects.load(run / "paths").plot()


if __name__ == "__main__":
    main(draw, "mechanism", COLUMN, __doc__, Path("runs/mechanism"))
