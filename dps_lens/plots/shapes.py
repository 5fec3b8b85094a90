"""Heatmaps as shapes: plotly draws theirs as bitmaps, which a printed page shows."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb, sample_colorscale

MAX_CELLS = 20_000
"""Cells of a figure above which its heatmaps stay bitmaps, as the file would be too large to open."""


def as_shapes(figure: go.Figure) -> go.Figure:
    """A copy whose heatmaps are rectangles, with the same colours, axes and colour bars."""
    heatmaps = [trace for trace in figure.data if trace.type == "heatmap"]
    if not heatmaps or sum(np.size(trace.z) for trace in heatmaps) > MAX_CELLS:
        return figure
    drawn = go.Figure(figure)
    drawn.data = ()
    kept: list[Any] = []
    shapes: list[dict[str, Any]] = []
    for trace in figure.data:
        if trace.type != "heatmap":
            kept.append(trace)
            continue
        axis = figure.layout[trace.coloraxis] if trace.coloraxis else trace
        low, high = (axis.cmin, axis.cmax) if trace.coloraxis else (axis.zmin, axis.zmax)
        low, high = (0.0, 1.0) if low is None else (float(low), float(high))
        shapes += _cells(trace, axis.colorscale, low, high)
        kept += _bar(trace, low, high)
        if trace.texttemplate:
            kept.append(_texts(trace))
        _axes(drawn, trace)
    drawn.add_traces(kept)
    drawn.layout.shapes = (*shapes, *figure.layout.shapes)
    return drawn


def _cells(trace: Any, colorscale: Any, low: float, high: float) -> Iterator[dict[str, Any]]:
    gap = 0.02 if trace.xgap or trace.ygap else 0.0
    z = np.array(trace.z, dtype=float)
    xs, ys = _places(trace.x, z.shape[1]), _places(trace.y, z.shape[0])
    inside = np.clip((z - low) / (high - low), 0, 1)
    for row, column in zip(*np.nonzero(~np.isnan(z)), strict=True):
        yield {
            "type": "rect",
            "xref": trace.xaxis or "x",
            "yref": trace.yaxis or "y",
            "x0": xs[column] - 0.5 + gap,
            "x1": xs[column] + 0.5 - gap,
            "y0": ys[row] - 0.5 + gap,
            "y1": ys[row] + 0.5 - gap,
            "fillcolor": _colour(colorscale, float(inside[row, column])),
            "line": {"width": 0},
            "layer": "between",
        }


def _colour(colorscale: Any, at: float) -> str:
    if str(colorscale[0][1]).startswith("rgba"):
        return str(colorscale[0][1])
    return str(sample_colorscale([[where, _rgb(colour)] for where, colour in colorscale], [at])[0])


def _rgb(colour: str) -> str:
    return colour if colour.startswith("rgb") else "rgb({},{},{})".format(*hex_to_rgb(colour))


def _places(values: Any, n: int) -> list[float]:
    """Where the cells lie; names lie at their numbers."""
    if values is None or any(isinstance(value, str) for value in values):
        return [float(index) for index in range(n)]
    return [float(value) for value in values]


def _bar(trace: Any, low: float, high: float) -> list[go.Scatter]:
    """A trace without points that carries the colour bar, or the place of a subplot."""
    marker: dict[str, Any] = {"color": [low]}
    if trace.coloraxis:
        marker["coloraxis"] = trace.coloraxis
    elif trace.showscale is not False:
        marker |= {
            "colorscale": trace.colorscale,
            "cmin": low,
            "cmax": high,
            "colorbar": trace.colorbar.to_plotly_json(),
        }
        marker["showscale"] = True
    else:
        return []
    return [
        go.Scatter(x=[None], y=[None], mode="markers", marker=marker, xaxis=trace.xaxis, yaxis=trace.yaxis,
                   showlegend=False)
    ]  # fmt: skip


def _texts(trace: Any) -> go.Scatter:
    rows, columns = np.shape(trace.z)
    places = [(row, column) for row in range(rows) for column in range(columns)]
    return go.Scatter(
        x=[column for _, column in places],
        y=[row for row, _ in places],
        text=[trace.text[row][column] for row, column in places],
        mode="text",
        showlegend=False,
    )


def _axes(figure: go.Figure, trace: Any) -> None:
    """The ranges that the heatmap gave the axes."""
    rows, columns = np.shape(trace.z)
    for letter, values, n in (("x", trace.x, columns), ("y", trace.y, rows)):
        name = (getattr(trace, f"{letter}axis") or letter).replace(letter, f"{letter}axis", 1)
        axis = figure.layout[name]
        places = _places(values, n)
        ends = [min(places) - 0.5, max(places) + 0.5]
        if any(not math.isfinite(end) for end in ends):
            continue
        if values is not None and any(isinstance(value, str) for value in values):
            axis.update(type="category", categoryorder="array", categoryarray=list(values))
        axis.range = ends[::-1] if axis.autorange == "reversed" else ends
        axis.autorange = None
