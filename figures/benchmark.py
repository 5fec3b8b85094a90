"""Who writes most like the user? Difference of every method to the profile alone, by corpus.

python -m figures.benchmark --run runs/benchmark
"""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from figures.common import intervals, main, read

COLUMN = "acl-wide"
CORPORA = ("headlines", "posts", "abstracts")


def draw(run: Path) -> go.Figure:
    parts, metric = [], ""
    for corpus in (name for name in CORPORA if (run / "tables" / f"{name}.csv").is_file()):
        frame = read(run, corpus)
        # The first metric is the one that settings were chosen by.
        metric = str(frame.columns[1])
        ends = {f"{metric} to rag{ending}": name for ending, name in (("", "mean"), ("_low", "low"), ("_high", "high"))}
        parts.append(frame.rename(columns=ends)[["method", *ends.values()]].dropna().assign(corpus=corpus))
    found = pd.concat(parts)
    x = f"{metric} less that of the profile alone"
    return intervals(found, label="method", group="corpus", x=x, title="Who writes most like the user?")


if __name__ == "__main__":
    main(draw, "benchmark", COLUMN, __doc__, Path("runs/benchmark"))
