"""Personalisation against fluency at every γ and K."""

import numpy as np
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from dps_lens.errors import EvaluationError
from dps_lens.evaluation.grid import SteeringGrid
from dps_lens.plots.theme import DASHES, LINES, MARKERS, TEMPLATE

_WORDS = {
    "NLL": "NLL under the unsteered model, nats per token",
    "KL": "KL(steered ‖ full), nats per token",
    "style": "style: similarity to the own texts − to the others'",
    "repeated": "repeated 3-grams, share",
}
_SMALLER_IS_BETTER = ("NLL", "KL", "repeated", "MAE")


def pareto(grid: SteeringGrid, *, y: str = "style", x: str = "NLL", title: str | None = None) -> go.Figure:
    """One line a K, one marker a γ, from γ = 0; the settings that no other beats in both measures are ringed.

    Args:
        grid: of `steering_grid`.
        y: what counts as personalisation.
        x: what it costs.
        title: of the figure.

    Raises:
        EvaluationError: the grid does not hold a measure.
    """
    _check("plots.pareto", grid, x, y)
    frame = grid.to_frame()
    wide = {name: frame[frame["measure"] == name].set_index(["K", "gamma"]) for name in (x, y)}
    figure = go.Figure()
    plain = (0, 0.0)
    for index, k in enumerate(grid.ks):
        at = sorted([(k, gamma) for gamma in grid.gammas] + [plain], key=lambda setting: setting[1])
        xs, ys = (wide[name].loc[at] for name in (x, y))
        pale = "rgba({},{},{},0.3)".format(*hex_to_rgb(LINES[index % len(LINES)]))
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
            line={"color": LINES[index % len(LINES)], "dash": DASHES[index % len(DASHES)], "width": 1.5},
            marker={"symbol": MARKERS[index % len(MARKERS)], "size": 7},
            name=f"K = {k}",
            hovertemplate=f"K = {k}, γ = %{{customdata[0]:g}}<br>{y} %{{y:.3f}} (%{{customdata[1]:.3f}} to "
            f"%{{customdata[2]:.3f}})<br>{x} %{{x:.3f}} (%{{customdata[3]:.3f}} to %{{customdata[4]:.3f}})"
            "<extra></extra>",
        )
    best = front(wide[x]["mean"].to_numpy(), wide[y].loc[wide[x].index, "mean"].to_numpy(), x, y)
    figure.add_scatter(
        x=wide[x]["mean"][best],
        y=wide[y].loc[wide[x].index, "mean"][best],
        mode="markers",
        marker={"symbol": "circle-open", "size": 13, "color": "#444444", "line": {"width": 1.2}},
        hoverinfo="skip",
        name="unbeaten",
    )
    users = len({one.user for one in grid.texts})
    figure.update_layout(
        template=TEMPLATE,
        title=title
        or f"{grid.manifest.get('rule', 'dps')}, numbers are γ: {y} against {x}, 95% intervals over {users} users",
        height=440,
        legend={"orientation": "h", "y": -0.2},
        xaxis={"title": _WORDS.get(x, x)},
        yaxis={"title": _WORDS.get(y, y)},
    )
    return figure


def k_sweep(grid: SteeringGrid, *, measure: str | None = None, title: str | None = None) -> go.Figure:
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
        title=title or f"{measure}: difference to greedy decoding, 95% intervals over users",
        height=380,
        legend={"orientation": "h", "y": -0.22},
        xaxis={"title": "heads (K)", "tickvals": list(grid.ks)},
        yaxis={"title": f"{_WORDS.get(measure, measure)}, difference"},
    )
    return figure


def front(x: np.ndarray, y: np.ndarray, x_name: str = "NLL", y_name: str = "style") -> np.ndarray:
    """Which points no other point beats: at least as good in both measures, and better in one.

    >>> front(np.array([1.0, 2.0, 2.0]), np.array([0.1, 0.3, 0.2])).tolist()
    [True, True, False]
    """
    x, y = (-of if name in _SMALLER_IS_BETTER else of for of, name in ((x, x_name), (y, y_name)))
    at_least = (x[:, None] >= x) & (y[:, None] >= y)
    better = (x[:, None] > x) | (y[:, None] > y)
    return ~np.any(at_least & better, axis=0)


def _check(call: str, grid: SteeringGrid, *measures: str) -> None:
    for name in measures:
        if name not in grid.measures:
            raise EvaluationError(f"{call}: measure {name!r} is not in this grid; use one of {grid.measures}")
