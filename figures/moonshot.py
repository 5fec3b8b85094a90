"""Is there a set that takes the gain over another user and costs nothing? Gain removed and both costs against K.

python -m figures.moonshot --run runs/finders
"""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dps_lens.plots.text import plain
from dps_lens.plots.theme import DASHES, LINES, MARKERS, TEMPLATE
from figures.common import main, read

COLUMN = "acl-wide"
PANELS = {
    "gain_removed_other": "gain removed",
    "copied gain_removed_other": "of it, copied",
    "rest gain_removed_other": "of it, the rest",
    "task_cost": "task cost",
    "neutral_cost": "neutral cost",
}
RANDOM = "random sets"


def draw(run: Path) -> go.Figure:
    effects, worth = read(run, "effects"), read(run, "worth")
    best = worth.set_index("family")["mean"].sort_values(ascending=False)
    shown = [name for name in best.index if name not in ("induction", "retrieval")][:3]
    shown += [name for name in ("induction",) if name in best.index]
    figure = make_subplots(rows=1, cols=len(PANELS), subplot_titles=list(PANELS.values()), horizontal_spacing=0.06)
    for number, family in enumerate(shown):
        _line(figure, effects[effects["family"] == family], family, number)
    _line(figure, effects[effects["family"] == shown[0]].filter(regex="^(family|K|random )"), RANDOM, len(shown))
    gain = effects[effects["K"] == 0].iloc[0]
    for place, measure in enumerate(PANELS, start=1):
        level = gain.get(measure.replace("gain_removed_other", "gain_other"), 0.0) if "gain" in measure else 0.0
        figure.add_hline(y=level, line={"dash": "dot", "color": "#777777"}, row=1, col=place)
    figure.update_layout(
        template=TEMPLATE, height=360, legend={"orientation": "h", "y": 1.2, "yanchor": "bottom"}, margin={"t": 90}
    )
    figure.update_xaxes(title="K")
    figure.update_yaxes(title="nats per token", col=1)
    return figure


def _line(figure: go.Figure, rows: pd.DataFrame, family: str, number: int) -> None:
    """A family in every panel; random sets where they were measured."""
    for place, measure in enumerate(PANELS, start=1):
        name = f"random {measure}" if family == RANDOM else measure
        if name not in rows:
            continue
        figure.add_scatter(
            x=rows["K"] + 0.25 * (number - 2),  # so that intervals do not hide each other
            y=rows[name],
            error_y={
                "array": rows[f"{name}_high"] - rows[name],
                "arrayminus": rows[name] - rows[f"{name}_low"],
                "thickness": 1,
                "width": 2,
            },
            mode="lines+markers",
            line={"color": LINES[number % len(LINES)], "dash": DASHES[number % len(DASHES)]},
            marker={"symbol": MARKERS[number % len(MARKERS)], "size": 6},
            name=plain(family),
            legendgroup=plain(family),
            showlegend=place == 1,
            row=1,
            col=place,
        )


if __name__ == "__main__":
    main(draw, "moonshot", COLUMN, __doc__, Path("runs/finders"))
