"""The numbers that a figure shows, as a table."""

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

if TYPE_CHECKING:
    import pandas


def points(figure: go.Figure) -> "pandas.DataFrame":
    """One row a point or cell: `trace`, `x`, `y`, `z` (of maps), and `low` and `high` where it has an error bar.

    An error bar's ends are on the axis that it lies along.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for trace in figure.data:
        name = trace.name or trace.type
        if getattr(trace, "z", None) is not None:
            rows += _cells(name, trace)
            continue
        columns = {axis: trace[axis] for axis in ("x", "y") if axis in trace and trace[axis] is not None}
        for axis, values in [*columns.items()]:
            bars = getattr(trace, f"error_{axis}", None)
            if bars is not None and bars.array is not None and "low" not in columns:
                middle, up = np.asarray(values, dtype=float), np.asarray(bars.array, dtype=float)
                down = up if bars.arrayminus is None else np.asarray(bars.arrayminus, dtype=float)
                columns |= {"low": middle - down, "high": middle + up}
        rows += [
            {"trace": name} | dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False)
        ]
    return pd.DataFrame(rows, columns=["trace", "x", "y", "z", "low", "high"]).dropna(axis="columns", how="all")


def _cells(name: str, trace: Any) -> list[dict[str, Any]]:
    """Of a map, row by row."""
    z = np.asarray(trace.z)
    across = trace.x if trace.x is not None else range(z.shape[1])
    up = trace.y if trace.y is not None else range(z.shape[0])
    return [{"trace": name, "x": x, "y": y, "z": z[i, j]} for i, y in enumerate(up) for j, x in enumerate(across)]
