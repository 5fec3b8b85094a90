"""Reading or writing? What heads take of the gain when edited at the response, at the profile, or everywhere.

python -m figures.positions --run runs/positions
"""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    found = pd.concat([read(run, "sides"), read(run, "turns")])
    found = found[found["measure"].isin(("gain_removed", "gain_removed, random sets"))]
    found = found.assign(group=found["heads"] + found["measure"].str.removeprefix("gain_removed"))
    return intervals(
        found, label="condition", group="group", x="gain taken, nats per token", title="Where do heads act?"
    )


if __name__ == "__main__":
    main(draw, "positions", COLUMN, __doc__, Path("runs/positions"))
