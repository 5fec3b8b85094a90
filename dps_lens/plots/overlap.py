"""The matrix of overlaps between head sets, with chance and ceiling on its colour bar."""

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import TEMPLATE

if TYPE_CHECKING:
    from dps_lens.stats.overlap import Overlap

_TICKS = (0.0, 1.0, 0.5, 0.25, 0.75, 0.1, 0.4)
_APART = 0.08
_MOST_NAMES = 40
_BLANK = "#dddddd"


def overlap(overlap: "Overlap", *, order: bool = True, title: str | None = None) -> go.Figure:
    """Jaccard overlap of every pair of sets, with the null interval and p on hover.

    Args:
        overlap: of `dps_lens.overlap`.
        order: similar sets side by side, else in the order they were given.
        title: by default what is compared.

    Returns:
        a figure with one heatmap trace in Cividis from 0 to the largest overlap, the diagonal blank. The colour bar
        states and marks chance (mean 2.5% and 97.5% quantiles of the null over pairs) and, for users, the mean overlap
        of one user's own halves.
    """
    k, exclude, half = (overlap.manifest.get(name) for name in ("k", "exclude", "half"))
    picked = list(overlap.order) if order else list(range(len(overlap.names)))
    names = [plain(overlap.names[index]) for index in picked]

    def matrix(name: str) -> np.ndarray:
        values = getattr(overlap, name).numpy()[np.ix_(picked, picked)]
        return np.where(np.eye(len(picked), dtype=bool), np.nan, values)

    low, high = (float(np.nanmean(matrix(name))) for name in ("null_low", "null_high"))
    legend, marks = [f"chance {low:.2f} to {high:.2f}"], {high: "chance"}
    specificity = overlap.specificity
    if specificity is not None:
        mean = specificity.set_index("measure")["mean"]
        legend.append(
            f"halves of {plain(half)}: within a user {mean['within']:.2f},<br>between users {mean['between']:.2f}"
        )
        marks = {float(mean["within"]): "within"} | marks
    shown = matrix("jaccard")
    there = [value for value in (*shown[~np.isnan(shown)].tolist(), *marks) if not np.isnan(value)]
    top = min(1.0, np.ceil(10 * max(0.2, *there)) / 10)
    figure = go.Figure(
        go.Heatmap(
            z=shown,
            x=names,
            y=names,
            customdata=np.stack([matrix(name) for name in ("null_low", "null_high", "null_mean", "p")], axis=-1),
            zmin=0,
            zmax=top,
            colorscale="Cividis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            colorbar={"title": {"text": "<br>".join(["Jaccard,", *legend])}, "thickness": 12, **_ticks(marks, top)},
            hovertemplate=(
                "<b>%{y}</b> and <b>%{x}</b><br>Jaccard %{z:.2f}<br>null %{customdata[2]:.2f} "
                "(95% %{customdata[0]:.2f} to %{customdata[1]:.2f})<br>p = %{customdata[3]:.3g}<extra></extra>"
            ),
        )
    )
    # Names may be numbers, which plotly would place on a scale.
    each = {"dtick": 1} if len(names) <= _MOST_NAMES else {}
    rows = {"type": "category", "autorange": "reversed", "automargin": True, **each}
    columns = {"type": "category", "tickangle": -45, "automargin": True, **each}
    if exclude is not None:
        rows |= {"title": f"top {k} without the other's top {100 * exclude:g}%"}
        columns |= {"title": f"the other's top {k}"}
    unit = plain(overlap.manifest.get("unit", "sets"))
    what = f"the top {k} heads" if unit == "users" or exclude is not None else "head sets"
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"Overlap of {what}: {len(names)} {unit}",
        height=max(320, 110 + 18 * len(names)),
        plot_bgcolor=_BLANK,
        xaxis=columns,
        yaxis=rows,
    )
    return figure


def _ticks(marks: dict[float, str], top: float) -> dict[str, list]:
    """Named marks, then round numbers up to the top where no other tick is near."""
    ticks: dict[float, str] = {}
    for value, text in [*marks.items(), *((tick, f"{tick:g}") for tick in (top, *_TICKS) if tick <= top)]:
        if all(abs(value - other) >= _APART * top for other in ticks):
            ticks[value] = text
    return {"tickvals": list(ticks), "ticktext": list(ticks.values())}
