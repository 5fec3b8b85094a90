"""What families of heads take, for growing K, beside random heads."""

from itertools import cycle
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from dps_lens.errors import ScoreError
from dps_lens.plots.text import plain
from dps_lens.plots.theme import DASHES, LINES, MARKERS, TEMPLATE

if TYPE_CHECKING:
    from dps_lens.validation.effects import SetEffects

_WORDS = {
    "gain_removed": "gain removed",
    "gain_left": "gain left",
    "gain_removed_other": "gain over another's profile removed",
    "gain_left_other": "gain over another's profile left",
    "task_cost": "cost of the task without profile",
    "neutral_cost": "cost on neutral text",
    "necessity": "loss from noising",
    "sufficiency": "recovered by denoising",
    "recovered": "recovered by the heads' vector",
    "recovered_other": "recovered by another user's vector",
}


def ablation(effects: "SetEffects", measure: str | None = None, *, title: str | None = None) -> go.Figure:
    """One line a family with its interval over users, and the band in which 95% of further random sets would lie.

    Args:
        effects: of `ablation_curve` or `patch_heads`.
        measure: one of `effects.measures`; the first by default.
        title: of the figure.

    Raises:
        ScoreError: the effects do not hold the measure.
    """
    measure = measure or effects.measures[0]
    if measure not in effects.measures:
        raise ScoreError(f"plots.ablation: measure {measure!r} is not in these effects; use one of {effects.measures}")
    frame = effects.to_frame()
    figure = go.Figure()
    styles = zip(effects.families, cycle(LINES), cycle(DASHES), cycle(MARKERS), strict=False)
    for index, (family, colour, dash, marker) in enumerate(styles):
        rows = frame[(frame["family"] == family) & (frame["measure"] == measure)].sort_values("k")
        x = list(rows["k"])
        if "control_low" in rows and rows["control_low"].notna().all():
            low, high = rows["control_low"], rows["control_high"]
            figure.add_scatter(
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
        figure.add_scatter(
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
    gain = frame[(frame["family"] == "full model") & (frame["measure"] == "gain")]
    if measure in ("gain_removed", "gain_left", "necessity", "sufficiency", "recovered") and len(gain):
        figure.add_hline(
            y=float(gain["mean"].iloc[0]), line={"dash": "dot", "color": "#777777"}, annotation_text="gain"
        )
    figure.add_hline(y=0, line={"color": "#cccccc", "width": 1})
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{plain(_WORDS.get(measure, measure).capitalize())}{_about_bands(effects)}",
        height=420,
        legend={"orientation": "h", "y": -0.2},
        xaxis={"title": "heads edited (K)", "tickvals": list(effects.ks)},
        yaxis={"title": f"{plain(_WORDS.get(measure, measure))}, nats per token"},
    )
    return figure


def _about_bands(effects: "SetEffects") -> str:
    if not effects.n_random:
        return ""
    return f"; {effects.no_range or 'bands hold the next random set with 95%'}"


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[index : index + 2], 16) for index in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.12)"
