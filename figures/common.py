"""What the scripts share: their command line, the tables of an experiment, and a plot of intervals."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from dps_lens import plots
from dps_lens.plots.export import WIDTHS
from dps_lens.plots.text import plain
from dps_lens.plots.theme import LINES, MARKERS, TEMPLATE

RUN, OUT = Path("runs/demo"), Path("figures/out")

Draw = Callable[[Path], go.Figure]


def main(draw: Draw, name: str, column: str, about: str | None, run: Path = RUN) -> None:
    """Draw one figure from the command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--run", type=Path, default=run, help="run folder")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--column", default=column, help=", ".join(WIDTHS))
    arguments = parser.parse_args()
    for file in plots.export(draw(arguments.run), arguments.out / name, column=arguments.column):
        print(file)


def read(run: Path, name: str) -> pd.DataFrame:
    """A table of an experiment."""
    return pd.read_csv(run / "tables" / f"{name}.csv")


def intervals(frame: pd.DataFrame, *, label: str, group: str, x: str, title: str, reference: float = 0.0) -> go.Figure:
    """Means with their intervals, one line a label and one colour a group, from the top down.

    Args:
        frame: columns `mean`, `low` and `high`.
        label: column of the names at the left.
        group: column of colours and markers.
        x: name of the axis.
        title: of the figure.
        reference: where nothing is found.
    """
    figure, labels = go.Figure(), list(dict.fromkeys(frame[label]))
    ticks = {"tickvals": list(range(len(labels))), "ticktext": list(map(plain, labels))}
    groups = list(dict.fromkeys(frame[group]))
    for number, name in enumerate(groups):
        rows = frame[frame[group] == name]
        shift = 0.7 * (number - (len(groups) - 1) / 2) / len(groups)
        figure.add_scatter(
            x=rows["mean"],
            y=[labels.index(one) + shift for one in rows[label]],
            error_x={
                "array": rows["high"] - rows["mean"],
                "arrayminus": rows["mean"] - rows["low"],
                "width": 2,
                "thickness": 1.3,
            },
            mode="markers",
            marker={"color": LINES[number % len(LINES)], "symbol": MARKERS[number % len(MARKERS)], "size": 6},
            customdata=rows[["low", "high", label]].assign(**{label: rows[label].map(plain)}),
            hovertemplate="%{customdata[2]}<br>%{x:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})"
            f"<extra>{plain(name)}</extra>",
            name=plain(name),
        )
    figure.add_vline(x=reference, line={"dash": "dot", "color": "#777777"})
    figure.update_layout(
        template=TEMPLATE,
        title=title,
        showlegend=len(groups) > 1,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        height=120 + 18 * len(groups) + len(labels) * (12 + 13 * len(groups)),
        xaxis={"title": x},
        yaxis={**ticks, "range": [len(labels) - 0.4, -0.6]},
    )
    return figure
