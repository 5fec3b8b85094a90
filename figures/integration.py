"""How many steps, donors and examples do integrated scores need? Agreement of the top heads of two halves of the users.

python -m figures.integration --run runs/integration
"""

from pathlib import Path

import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl"


def draw(run: Path) -> go.Figure:
    frame = read(run, "settings")
    frame = frame[frame["K"] == frame["K"].min()].rename(
        columns={"of halves": "mean", "of halves_low": "low", "of halves_high": "high"}
    )
    frame["setting"] = [f"{row.examples} examples, {row.donors} donors" for row in frame.itertuples()]
    frame["nodes"] = [f"{steps} nodes" for steps in frame["steps"]]
    title = "Which integrated scores would other users give again?"
    return intervals(frame, label="setting", group="nodes", x=f"Jaccard of the top {frame['K'].iloc[0]}", title=title)


if __name__ == "__main__":
    main(draw, "integration", COLUMN, __doc__, Path("runs/integration"))
