"""Personalisation against fluency at every γ and K."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from dps_lens.errors import EvaluationError
from dps_lens.evaluation.metrics import METRICS
from dps_lens.plots.text import plain
from dps_lens.plots.theme import DASHES, LINES, MARKERS, TEMPLATE

if TYPE_CHECKING:
    from dps_lens.evaluation.grid import SteeringGrid

_WORDS = {
    "NLL": "unsteered NLL, nats per token",
    "KL": "KL, nats per token",
    "style": "style: own − others'",
    "repeated": "repeated 3-grams, share",
}


def pareto(
    grids: "SteeringGrid | Mapping[str, SteeringGrid]", *, y: str = "style", x: str = "NLL", title: str | None = None
) -> go.Figure:
    """One line a rule and K, one marker a γ, from γ = 0; the settings that no other beats in both measures are ringed.

    Style is a text's similarity to the user's own texts less that to others'; NLL is what the unsteered model makes of
    it; KL is that of the steered to the full model's next tokens, nats per token.

    Args:
        grids: of `steering_grid`; several by name, such as one a rule, share the picture.
        y: what counts as personalisation.
        x: what it costs.
        title: of the figure.

    Raises:
        EvaluationError: a grid does not hold a measure, or the grids are of different examples.
    """
    named = dict(grids) if isinstance(grids, Mapping) else {"": grids}
    for grid in named.values():
        _check("plots.pareto", grid, x, y)
    if len({tuple(sorted(grid.references)) for grid in named.values()}) != 1:
        raise EvaluationError("plots.pareto: give one grid, or several of the same examples")
    figure = go.Figure()
    points: list[tuple[float, float]] = []
    lines = [(name, k) for name, grid in named.items() for k in grid.ks]
    for index, (name, k) in enumerate(lines):
        grid = named[name]
        wide = grid.to_frame().set_index(["measure", "K", "gamma"])
        at = sorted([(k, gamma) for gamma in grid.gammas] + [(0, 0.0)], key=lambda setting: setting[1])
        xs, ys = (wide.loc[[(measure, *setting) for setting in at]] for measure in (x, y))
        points += zip(xs["mean"], ys["mean"], strict=True)
        colour = LINES[index % len(LINES)]
        pale = "rgba({},{},{},0.3)".format(*hex_to_rgb(colour))
        label = plain(f"{name}, K = {k}" if name else f"K = {k}")
        figure.add_scatter(
            x=xs["mean"],
            y=ys["mean"],
            error_x={"array": xs["high"] - xs["mean"], "color": pale, "thickness": 1, "width": 0},
            error_y={"array": ys["high"] - ys["mean"], "color": pale, "thickness": 1, "width": 0},
            customdata=np.stack([[gamma for _, gamma in at], ys["low"], ys["high"], xs["low"], xs["high"]], axis=-1),
            text=[f"{gamma:g}" if gamma or not index else "" for _, gamma in at],
            textposition="top left",
            textfont={"size": 9},
            mode="lines+markers+text",
            line={"color": colour, "dash": DASHES[index % len(DASHES)], "width": 1.5},
            marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
            name=label,
            hovertemplate=f"{label}, γ = %{{customdata[0]:g}}<br>{plain(y)} %{{y:.3f}} (%{{customdata[1]:.3f}} to "
            f"%{{customdata[2]:.3f}})<br>{plain(x)} %{{x:.3f}} (%{{customdata[3]:.3f}} to %{{customdata[4]:.3f}})"
            "<extra></extra>",
        )
    every = np.array(list(dict.fromkeys(points)))
    best = every[front(every[:, 0], every[:, 1], x, y)]
    figure.add_scatter(
        x=best[:, 0],
        y=best[:, 1],
        mode="markers",
        marker={"symbol": "circle-open", "size": 13, "color": "#444444", "line": {"width": 1.2}},
        hoverinfo="skip",
        name="front",
    )
    first = next(iter(named.values()))
    rule, users = first.manifest.get("rule", "dps"), len({one.user for one in first.texts})
    what = plain(rule) if len(named) == 1 else f"{len(named)} rules"
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{what}, numbers are γ: {plain(y)} against {plain(x)}, 95% intervals over {users} users",
        height=440,
        legend={"orientation": "h", "y": -0.2},
        xaxis={"title": plain(_WORDS.get(x, x))},
        yaxis={"title": plain(_WORDS.get(y, y))},
    )
    return figure


def k_sweep(grid: "SteeringGrid", *, measure: str | None = None, title: str | None = None) -> go.Figure:
    """One line a γ: a measure's difference to the model's own decoding, against the number of heads.

    Args:
        grid: of `steering_grid`.
        measure: the task's first metric by default.
        title: of the figure.

    Raises:
        EvaluationError: the grid does not hold the measure.
    """
    measure = measure or grid.measures[0]
    _check("plots.k_sweep", grid, measure)
    frame = grid.to_frame()
    frame = frame[(frame["measure"] == measure) & (frame["gamma"] != 0)]
    figure = go.Figure()
    for index, gamma in enumerate(grid.gammas):
        rows = frame[frame["gamma"] == gamma].sort_values("K")
        figure.add_scatter(
            x=rows["K"],
            y=rows["difference"],
            error_y={"array": rows["difference_high"] - rows["difference"], "thickness": 1, "width": 2},
            customdata=rows[["difference_low", "difference_high"]],
            mode="lines+markers",
            line={"color": LINES[index % len(LINES)], "dash": DASHES[index % len(DASHES)], "width": 1.5},
            marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
            name=f"γ = {gamma:g}",
            hovertemplate=f"K = %{{x}}, γ = {gamma:g}<br>%{{y:+.3f}} (%{{customdata[0]:.3f}} to %{{customdata[1]:.3f}})"
            "<extra></extra>",
        )
    figure.add_hline(y=0, line={"color": "#cccccc", "width": 1})
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{plain(measure)}: difference to greedy decoding, 95% intervals over users",
        height=380,
        legend={"orientation": "h", "y": -0.22},
        xaxis={"title": "heads (K)", "tickvals": list(grid.ks)},
        yaxis={"title": f"Δ {plain(_WORDS.get(measure, measure))}"},
    )
    return figure


def front(x: np.ndarray, y: np.ndarray, x_name: str = "NLL", y_name: str = "style") -> np.ndarray:
    """Which points no other point beats: at least as good in both measures, and better in one.

    >>> front(np.array([1.0, 2.0, 2.0]), np.array([0.1, 0.3, 0.2])).tolist()
    [True, True, False]
    """
    x, y = (METRICS[name].sign * of for of, name in ((x, x_name), (y, y_name)))
    at_least = (x[:, None] >= x) & (y[:, None] >= y)
    better = (x[:, None] > x) | (y[:, None] > y)
    return ~np.any(at_least & better, axis=0)


def _check(call: str, grid: "SteeringGrid", *measures: str) -> None:
    for name in measures:
        if name not in grid.measures:
            raise EvaluationError(f"{call}: measure {name!r} is not in this grid; use one of {grid.measures}")
