"""What the scripts share: their command line."""

import argparse
from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go

from dps_lens import plots
from dps_lens.plots.export import WIDTHS

RUN, OUT = Path("runs/demo"), Path("figures/out")

Draw = Callable[[Path], go.Figure]


def main(draw: Draw, name: str, column: str, about: str | None) -> None:
    """Draw one figure from the command line."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--run", type=Path, default=RUN, help="run folder of 'dps-lens demo' or 'score'")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--column", default=column, help=", ".join(WIDTHS))
    arguments = parser.parse_args()
    for file in plots.export(draw(arguments.run), arguments.out / name, column=arguments.column):
        print(file)
