"""What is kept of a gain when only the top of a ranking is, beside random rankings."""

from itertools import cycle
from math import isnan, log10
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from dps_lens.plots.text import plain
from dps_lens.plots.theme import DASHES, LINES, MARKERS, TEMPLATE

if TYPE_CHECKING:
    import pandas

    from dps_lens.validation.circuits import Faithfulness

_GREY = "#777777"
_RANDOM = "random rankings"


def faithfulness(curves: "Faithfulness", *, title: str | None = None) -> go.Figure:
    """f against the share of heads that are kept, one line a ranking with its interval over users.

    The share is drawn on a logarithmic axis, without sizes of less than one head; areas are over the share itself.
    All lines end in the whole model, so that each bears its name where it is farthest from the others. The band is that
    in which 95% of further random rankings would lie. Without a gain to take shares of, the figure says so.

    Args:
        curves: of `faithfulness`.
        title: of the figure.
    """
    frame = curves.to_frame()
    frame = frame[frame["n_heads"] > 0]
    figure = go.Figure()
    undefined = curves.undefined()
    if undefined:
        figure.add_annotation(text=plain(undefined), x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    else:
        _draw_random(figure, frame)
        _draw_families(figure, curves, frame)
        for level, dash in ((0, "solid"), (1, "dot")):
            figure.add_hline(y=level, line={"color": "#cccccc" if level == 0 else _GREY, "width": 1, "dash": dash})
    shares = sorted({*frame["size"]})
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"What circuits of the top heads keep{_about_band(curves)}",
        height=420,
        showlegend=not undefined,
        legend={"orientation": "h", "y": -0.2},
        xaxis={
            "title": "heads kept, % of all",
            "type": "log",
            "tickvals": shares,
            "ticktext": [f"{100 * share:g}" for share in shares],
        },
        yaxis={"title": "share of the gain kept, f"},
    )
    return figure


def _draw_random(figure: go.Figure, frame: "pandas.DataFrame") -> None:
    if "control" not in frame:
        return
    rows = frame.drop_duplicates("size").sort_values("size")
    x = list(rows["size"])
    if rows["control_low"].notna().all():
        figure.add_scatter(
            x=[*x, *x[::-1]],
            y=[*rows["control_high"], *rows["control_low"][::-1]],
            mode="lines",
            fill="toself",
            fillcolor="rgba(119,119,119,0.15)",
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            name="the next random ranking (95%)",
        )
    figure.add_scatter(
        x=x,
        y=rows["control"],
        mode="lines",
        line={"color": _GREY, "width": 1},
        name=f"{_RANDOM}, mean",
        hovertemplate="<b>random rankings</b>, %{x:.1%} of heads<br>mean %{y:.3f}<extra></extra>",
    )


def _draw_families(figure: go.Figure, curves: "Faithfulness", frame: "pandas.DataFrame") -> None:
    areas = curves.areas().set_index("family")
    f = frame.pivot(index="size", columns="family", values="f")
    lines = f.assign(**{_RANDOM: frame.groupby("size")["control"].first()}) if "control" in frame else f
    styles = zip(curves.families, cycle(LINES), cycle(DASHES), cycle(MARKERS), strict=False)
    for family, colour, dash, marker in styles:
        rows = frame[(frame["family"] == family) & frame["f"].notna()].sort_values("size")
        if rows.empty:
            continue
        cpr, cmd = areas.loc[family, ["CPR", "CMD"]]
        about = f"ranks {rows['n_heads'].max()} heads" if isnan(cpr) else f"CPR {cpr:.2f}, CMD {cmd:.2f}"
        figure.add_scatter(
            x=rows["size"],
            y=rows["f"],
            error_y={
                "array": rows["high"] - rows["f"],
                "arrayminus": rows["f"] - rows["low"],
                "thickness": 1,
                "width": 2,
            },
            customdata=rows[["n_heads", "low", "high"]],
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"symbol": marker, "size": 7},
            name=f"{plain(family)} ({about})",
            hovertemplate="<b>" + plain(family) + "</b>, %{customdata[0]} heads (%{x:.1%})<br>f %{y:.3f} "
            "(%{customdata[1]:.3f} to %{customdata[2]:.3f})<extra></extra>",
        )
        size, above = _free(lines, family)
        figure.add_annotation(
            text=plain(family),
            x=log10(size),
            y=float(f.loc[size, family]),
            xanchor="right" if above else "left",
            yanchor="bottom" if above else "top",
            xshift=-4 if above else 4,
            showarrow=False,
            font={"color": colour, "size": 11},
        )


def _free(lines: "pandas.DataFrame", family: str) -> tuple[float, bool]:
    """The size at which a line is farthest from its nearest neighbour, and whether its name has room above it."""
    own = lines[family].dropna()
    own = own[own.index < 1] if (own.index < 1).any() else own
    apart = lines.drop(columns=family).loc[own.index].rsub(own, axis=0)
    size = apart.abs().min(axis=1).fillna(0).idxmax()
    nearest = apart.loc[size].dropna()
    return float(size), nearest.empty or bool(nearest[nearest.abs().idxmin()] >= 0)


def _about_band(curves: "Faithfulness") -> str:
    if not curves.n_random or curves.undefined():
        return ""
    return f"; {curves.no_range or 'the band holds the next random ranking with 95%'}"
