"""Layer × head maps of scores."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dps_lens.errors import ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.plots.text import plain
from dps_lens.plots.theme import SIGNED, TEMPLATE
from dps_lens.scores import HeadScores
from dps_lens.stats.skew import is_skewed

if TYPE_CHECKING:
    from dps_lens.stats.significance import Significance
from dps_lens.stats.reliability import split_half

_QUANTILE = 0.995
_FADED = "rgba(255,255,255,0.75)"
_CORRECTION = {
    "max_t": "family-wise over heads",
    "bh": "false discovery rate",
    "bootstrap_t": "family-wise over heads, bootstrap t",
}


def heatmap(
    scores: HeadScores,
    *,
    user: str | None = None,
    component: str | None = None,
    heads: HeadSet | None = None,
    significance: "Significance | None" = None,
    fade: bool = False,
    title: str | None = None,
) -> go.Figure:
    """Mean score of every head, with its interval and rank on hover.

    Args:
        scores: of `score_heads`.
        user: one user instead of the mean over users; the title then states how far the user's examples agree.
        component: one of `scores.components` instead of the score itself.
        heads: heads to outline, such as those of a reference family; the title names the set's label.
        significance: of `significant_heads`; dots mark its heads. For populations, not for one user.
        fade: pale cells whose 95% interval spans 0.
        title: by default what is shown, of whom.

    Returns:
        a figure whose first trace is the heatmap; blue is positive, white is zero, and colours end at the 99.5th
        percentile of |score|, which the colour bar states.

    Raises:
        ScoreError: significance for one user.
    """
    if significance is not None and user is not None:
        raise ScoreError("plots.heatmap: significance is about a population; one user's map has none")
    mean = scores.mean(user, of=component).numpy()
    low, high = (bound.numpy() for bound in scores.ci(0.95, user, of=component))
    skewed = is_skewed(scores.skewness(user, of=component).numpy(), len(scores.samples(user)))
    rank = np.empty(mean.size, dtype=int)
    rank[np.argsort(-mean.ravel(), kind="stable")] = np.arange(1, mean.size + 1)
    unit = plain(scores.manifest.get("unit", "nats per token"))
    limit = _limit(mean)
    layers, n_heads = mean.shape
    names = [[str(Head(layer, head)) for head in range(n_heads)] for layer in range(layers)]
    details = np.stack([low, high, rank.reshape(mean.shape)], axis=-1)
    figure = go.Figure(
        go.Heatmap(
            z=mean,
            x=list(range(n_heads)),
            y=list(range(layers)),
            text=names,
            customdata=details,
            zmid=0,
            zmin=-limit,
            zmax=limit,
            colorscale=SIGNED,
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": _quantity(scores, unit, limit)}, "thickness": 12},
            hovertemplate=(
                f"<b>%{{text}}</b><br>%{{z:.4f}} {unit}"
                "<br>95% interval %{customdata[0]:.4f} to %{customdata[1]:.4f}"
                "<br>rank %{customdata[2]} of " + str(mean.size) + "<extra></extra>"
            ),
        )
    )
    if fade:
        figure.add_heatmap(
            z=np.where((low <= 0) & (high >= 0), 1.0, np.nan),
            x=list(range(n_heads)),
            y=list(range(layers)),
            colorscale=[[0, _FADED], [1, _FADED]],
            showscale=False,
            hoverinfo="skip",
        )
    if significance is not None:
        rows, columns = significance.significant.numpy().nonzero()
        figure.add_scatter(
            x=columns, y=rows, mode="markers", marker={"color": "black", "size": 4}, hoverinfo="skip", showlegend=False
        )
    for head in heads or ():
        figure.add_shape(
            type="rect",
            x0=head.head - 0.5,
            x1=head.head + 0.5,
            y0=head.layer - 0.5,
            y1=head.layer + 0.5,
            line={"color": "black", "width": 1.5},
        )
    notes = [
        f"outlined: {plain(heads.label)}" if heads is not None and heads.label else "",
        f"dots: p ≤ {significance.alpha:g}, {_CORRECTION[significance.correction]}" if significance is not None else "",
        "effects are skewed over users, dots too many" if significance is not None and significance.caveat else "",
        "pale: the interval spans 0" if fade else "",
        f"skewed over {'examples' if user else 'users'}: intervals are short" if skewed else "",
        _reliability(scores, user) if user is not None and component is None else "",
    ]
    subtitle = "<br><sup>" + "; ".join(note for note in notes if note) + "</sup>" if any(notes) else ""
    figure.update_layout(
        template=TEMPLATE,
        title=(title or plain(_title(scores, user, component))) + subtitle,
        height=max(320, 110 + 15 * layers),
        xaxis={"title": "head", "dtick": 1 if n_heads <= 16 else 4},
        yaxis={"title": "layer", "dtick": 1 if layers <= 16 else 5},
    )
    return figure


def heatmaps(
    scores: HeadScores, *, users: Sequence[str] | None = None, columns: int = 4, title: str | None = None
) -> go.Figure:
    """Small multiples: the map of every user, all in the same colours.

    Args:
        scores: of `score_heads`.
        users: which, and in which order; all by default.
        columns: maps in a row.
        title: of the figure.

    Raises:
        ScoreError: a user is not in the scores.
    """
    shown = list(users if users is not None else scores.users)
    maps = [scores.mean(user).numpy() for user in shown]
    limit, rows = _limit(np.stack(maps)), -(-len(shown) // columns)
    unit = plain(scores.manifest.get("unit", "nats per token"))
    figure = make_subplots(
        rows=rows,
        cols=min(columns, len(shown)),
        subplot_titles=[plain(user) for user in shown],
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=min(0.3 / rows, 0.12),
    )
    layers, n_heads = maps[0].shape
    names = [[str(Head(layer, head)) for head in range(n_heads)] for layer in range(layers)]
    for index, (user, mean) in enumerate(zip(shown, maps, strict=True)):
        figure.add_heatmap(
            z=mean,
            x=list(range(n_heads)),
            y=list(range(layers)),
            text=names,
            coloraxis="coloraxis",
            hovertemplate=f"{plain(user)}, <b>%{{text}}</b><br>%{{z:.4f}} {unit}<extra></extra>",
            row=index // columns + 1,
            col=index % columns + 1,
        )
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{plain(_title(scores, None, None).split(':')[0])}: {len(shown)} users",
        height=90 + rows * max(150, 5 * layers),
        coloraxis={
            "colorscale": SIGNED,
            "cmid": 0,
            "cmin": -limit,
            "cmax": limit,
            "colorbar": {"title": {"text": _quantity(scores, unit, limit)}, "thickness": 12},
        },
    )
    figure.update_xaxes(title="head", row=rows)
    figure.update_yaxes(title="layer", col=1)
    figure.update_annotations(font={"size": 11})
    return figure


def _limit(mean: np.ndarray) -> float:
    return float(np.quantile(np.abs(mean), _QUANTILE)) or 1e-9


def _quantity(scores: HeadScores, unit: str, limit: float) -> str:
    """What colours are: the first words of what the scores are called, unit and ends."""
    return f"{plain(scores.name.split(' → ')[0].split(',')[0])}, {unit}<br>(ends at ±{limit:.2g})"


def _reliability(scores: HeadScores, user: str) -> str:
    """How far halves of one user's examples agree."""
    if len(scores.rows(user)) < 2:
        return "one example: no interval, no reliability"
    agreement = split_half(scores, k=1, user=user, n_splits=50).set_index("measure")["mean"]
    return f"rank correlation of halves of the examples {agreement['spearman']:.2f}"


def _title(scores: HeadScores, user: str | None, component: str | None) -> str:
    if "family" in scores.manifest:
        return f"{scores.name.capitalize()}: mean of {len(scores.user_ids)} prompts"
    name = scores.name_of(component) if component else scores.name
    name = name[:1].upper() + name[1:]
    rows = len(scores.rows(user)) if user else len(scores.user_ids)
    whom = f"user {user}" if user else f"mean of {len(scores.users)} users"
    return f"{name}: {whom}, {rows} examples"
