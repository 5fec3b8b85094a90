"""At the same KL, which rule makes the users' own text likelier? Change of the NLL by method.

python -m figures.rules --run runs/rules
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import main, read
from figures.steering import changes

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    return changes(read(run, "text"), "Rules at matched KL")


if __name__ == "__main__":
    main(draw, "rules", COLUMN, __doc__, Path("runs/rules"))
