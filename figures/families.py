"""Gain over no profile lost against fluency lost: each line is a family, its points growing K.

python -m figures.families --run runs/families
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.causality import losses
from figures.common import main, read

COLUMN = "acl-wide"


def draw(run: Path) -> go.Figure:
    return losses(read(run, "main"), "What do families of heads take, and what do they cost?")


if __name__ == "__main__":
    main(draw, "families", COLUMN, __doc__, Path("runs/families"))
