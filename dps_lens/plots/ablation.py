"""What families of heads take and what they cost, for growing K, beside random heads."""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dps_lens.errors import ScoreError
from dps_lens.plots.text import plain
from dps_lens.plots.theme import DASHES, LINES, MARKERS, TEMPLATE

if TYPE_CHECKING:
    import pandas

    from dps_lens.validation.effects import SetEffects

# What one figure shows, where it was measured: the gain, both off-target costs, and the same sets patched.
_PANELS = (
    ("gain_removed_other", "task_cost", "neutral_cost", "necessity_other", "sufficiency_other"),
    ("gain_removed", "task_cost", "neutral_cost"),
    ("necessity", "sufficiency"),
)
_WORDS = {
    "gain_removed": "gain removed",
    "gain_left": "gain left",
    "gain_removed_other": "gain over another's profile removed",
    "gain_left_other": "gain over another's profile left",
    "task_cost": "cost of the task without profile",
    "neutral_cost": "cost on neutral text",
    "necessity": "loss from noising",
    "sufficiency": "recovered by denoising",
    "necessity_other": "loss from noising by another's run",
    "sufficiency_other": "recovered from another's run by denoising",
    "recovered": "recovered by the heads' vector",
    "recovered_other": "recovered by another user's vector",
}
# Above a panel, which a printed column may leave 25 letters.
_SHORT = {
    "gain_removed_other": "gain removed, other user",
    "gain_removed": "gain removed, no profile",
    "task_cost": "task cost",
    "neutral_cost": "neutral cost",
    "necessity": "necessity, no profile",
    "sufficiency": "sufficiency, no profile",
    "necessity_other": "necessity, other user",
    "sufficiency_other": "sufficiency, other user",
    "gain_left_other": "gain left, other user",
    "gain_left": "gain left, no profile",
}
_PARTS = {
    "gain": ("gain_removed", "gain_left", "necessity", "sufficiency", "recovered"),
    "gain_other": ("gain_removed_other", "gain_left_other", "necessity_other", "sufficiency_other"),
}
_CROWDED = 0.09
"""Of the axis of a panel: sizes of sets that are nearer than this share one label."""

_ROOM = 0.95
"""Of the figure, below the names of the first row: a legend that `export` puts above it is clear of them."""


def ablation(
    effects: "SetEffects",
    measure: str | Sequence[str] | None = None,
    *,
    columns: int = 3,
    title: str | None = None,
) -> go.Figure:
    """One line a family with its interval over users, and the band in which 95% of further random sets would lie.

    Panels have one scale, so that what is removed is seen beside what it costs.

    Args:
        effects: of `ablation_curve` or `patch_heads`.
        measure: one of `effects.measures`, or several, a panel each; by default the gain over another user that is
            removed (over no profile, where there is no other), both off-target costs, and the same sets patched.
        columns: panels in a row; 2 for a narrow column of print.
        title: of the figure.

    Raises:
        ScoreError: the effects do not hold the measure.
    """
    shown = (measure,) if isinstance(measure, str) else tuple(measure or _by_default(effects.measures))
    for name in shown:
        if name not in effects.measures:
            raise ScoreError(f"plots.ablation: measure {name!r} is not in these effects; use one of {effects.measures}")
    frame = effects.to_frame()
    across = max(1, min(columns, len(shown)))
    down = -(-len(shown) // across)
    figure = make_subplots(
        rows=down, cols=across, shared_xaxes="all", shared_yaxes="all",
        horizontal_spacing=0.1 / across, vertical_spacing=0.28 / down,
    )  # fmt: skip
    for place, name in enumerate(shown):
        at = {"row": place // across + 1, "col": place % across + 1}
        for trace in _lines(effects, frame, name):
            trace.showlegend = trace.showlegend is not False and place == 0
            figure.add_trace(trace, **at)
        for gain in (gain for gain, parts in _PARTS.items() if name in parts):
            for row in frame[(frame["family"] == "full model") & (frame["measure"] == gain)].to_dict("records"):
                figure.add_hline(y=row["mean"], line={"dash": "dot", "color": "#777777"}, annotation_text="gain", **at)
        figure.add_hline(y=0, line={"color": "#cccccc", "width": 1}, **at)
    words = plain(_WORDS.get(shown[0], shown[0]))
    units = {effects.unit_of(name) for name in shown}
    unit = plain(units.pop() if len(units) == 1 else "nats")
    if len(shown) == 1:
        figure.update_layout(xaxis={"title": "heads edited (K)"}, yaxis={"title": f"{words}, {unit}"})
    else:
        words = "what heads remove and what they cost"
        _name_panels(figure, shown, across, down, unit)
    figure.update_xaxes(tickvals=list(effects.ks) if across == 1 else _apart(effects.ks))
    height = 420 if down == 1 else 130 + 210 * down
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{words.capitalize()}{_about_bands(effects)}",
        height=height,
        legend={"orientation": "h", "y": -65 / (height - 96)},
    )
    return figure


def _name_panels(figure: go.Figure, shown: Sequence[str], across: int, down: int, unit: str) -> None:
    """A name above each panel; what the axes show once for all of them."""
    figure.for_each_yaxis(lambda axis: axis.update(domain=[_ROOM * end for end in axis.domain]))
    for place in range(across * down):
        at = {"row": place // across + 1, "col": place % across + 1}
        if place >= len(shown):
            figure.update_xaxes(visible=False, **at)
            figure.update_yaxes(visible=False, **at)
            continue
        axes = figure.get_subplot(**at)
        figure.add_annotation(
            text=f"<b>{plain(_SHORT.get(shown[place], _WORDS.get(shown[place], shown[place])))}</b>",
            x=axes.xaxis.domain[0], xref="paper", xanchor="left",
            y=axes.yaxis.domain[1], yref="paper", yanchor="bottom", showarrow=False,
        )  # fmt: skip
        if place + across >= len(shown):
            figure.update_xaxes(showticklabels=True, title="heads edited (K)" if at["row"] == down else None, **at)
    figure.update_yaxes(title=unit, row=(down + 1) // 2, col=1)


def _by_default(measures: Sequence[str]) -> Sequence[str]:
    for panels in _PANELS:
        if panels[0] in measures:
            return [name for name in panels if name in measures]
    return measures[:1]


def _lines(effects: "SetEffects", frame: "pandas.DataFrame", measure: str) -> Iterator[go.Scatter]:
    """Bands and lines of one measure, family by family."""
    styles = zip(effects.families, cycle(LINES), cycle(DASHES), cycle(MARKERS), strict=False)
    for index, (family, colour, dash, marker) in enumerate(styles):
        rows = frame[(frame["family"] == family) & (frame["measure"] == measure)].sort_values("k")
        x = list(rows["k"])
        if "control_low" in rows and rows["control_low"].notna().all():
            low, high = rows["control_low"], rows["control_high"]
            yield go.Scatter(
                x=[*x, *x[::-1]],
                y=[*high, *low[::-1]],
                mode="lines",
                fill="toself",
                fillcolor=_pale(colour),
                line={"width": 0},
                hoverinfo="skip",
                legendgroup=family,
                showlegend=False,
                name=f"{plain(family)}: the next random set (95%)",
            )
        yield go.Scatter(
            x=[k + 0.12 * (index - len(effects.families) / 2) for k in x],
            y=rows["mean"],
            error_y={"array": rows["high"] - rows["mean"], "thickness": 1, "width": 2},
            customdata=rows[["k", "low", "high"]],
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": marker, "size": 7},
            legendgroup=family,
            name=plain(family),
            hovertemplate="<b>" + plain(family) + "</b>, K = %{customdata[0]}<br>%{y:.3f} "
            "(%{customdata[1]:.3f} to %{customdata[2]:.3f})<extra></extra>",
        )


def _apart(ks: Sequence[int]) -> list[int]:
    """Sizes of sets whose labels do not run into each other; the largest is always there."""
    near = _CROWDED * (max(ks) - min(ks))
    kept: list[int] = []
    for k in sorted(ks, reverse=True):
        if not kept or kept[-1] - k > near:
            kept.append(k)
    return kept[::-1]


def _about_bands(effects: "SetEffects") -> str:
    if not effects.n_random:
        return ""
    return f"; {effects.no_range or 'bands hold the next random set with 95%'}"


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.12)"
