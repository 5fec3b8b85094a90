"""Where the profile is read: the mean map of all users, the heads that were found (or the top ten) outlined, heads of
the population dotted.

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
    found = run / "found"
    there = (found / f"{dps.FoundHeads.stem}.json").is_file()
    heads = dps.FoundHeads.load(found).heads if there else scores.top(10, label="top 10")
    return plots.heatmap(scores, heads=heads, significance=dps.significant_heads(scores), fade=True)


if __name__ == "__main__":
    main(draw, "heads", COLUMN, __doc__)
