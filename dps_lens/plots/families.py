"""Two scores of the same heads against each other."""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dps_lens.errors import ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.plots.text import plain
from dps_lens.plots.theme import LINES, TEMPLATE
from dps_lens.scores import HeadScores

_REST = "#9aa5b1"


def families(
    scores: HeadScores,
    reference: HeadScores,
    *,
    k: int = 10,
    names: tuple[str, str] | None = None,
    title: str | None = None,
) -> go.Figure:
    """One dot a head: its score against its score in another family, with both distributions at the edges.

    Args:
        scores: on the vertical axis, such as those of `score_heads`.
        reference: on the horizontal axis, such as one of `reference_heads`.
        k: the top K of each are coloured, those of both apart, and named.
        names: of the two; by default their families.
        title: of the figure; by default the overlap of the top K and the rank correlation over all heads.

    Raises:
        ScoreError: scores of different models, or undefined ones.
    """
    from scipy.stats import spearmanr

    for one in (scores, reference):
        one.check_defined("plots.families")
    if scores.values.shape[1:] != reference.values.shape[1:]:
        raise ScoreError(
            f"plots.families: {tuple(scores.values.shape[1:])} heads against {tuple(reference.values.shape[1:])}; "
            "score both on one model"
        )
    own, other = map(plain, names or (_name(scores), _name(reference)))
    y, x = (one.mean().numpy().ravel() for one in (scores, reference))
    ours, theirs = scores.top(k), reference.top(k)
    n_heads = scores.values.shape[2]
    heads = [Head(index // n_heads, index % n_heads) for index in range(len(y))]
    groups: list[tuple[str, HeadSet | list[Head], str, str]] = [
        ("neither", [head for head in heads if head not in ours and head not in theirs], _REST, "circle"),
        (f"top {k}: {own}", ours - theirs, LINES[0], "circle"),
        (f"top {k}: {other}", theirs - ours, LINES[1], "square"),
        ("both", ours & theirs, LINES[6], "diamond"),
    ]
    figure = make_subplots(
        rows=2,
        cols=2,
        column_widths=[0.84, 0.16],
        row_heights=[0.16, 0.84],
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.02,
    )
    for name, members, colour, symbol in groups:
        at = [head.layer * n_heads + head.head for head in members]
        labels = [str(heads[index]) for index in at]
        figure.add_scatter(
            x=x[at],
            y=y[at],
            text=labels,
            mode="markers" if name == "neither" else "markers+text",
            textposition="top center",
            textfont={"size": 9, "color": colour},
            marker={"color": colour, "symbol": symbol, "size": 4 if name == "neither" else 7},
            name=f"{name} ({len(at)})",
            hovertemplate="<b>%{text}</b><br>%{y:.4f} " + own + "<br>%{x:.4f} " + other + "<extra></extra>",
            row=2,
            col=1,
        )
    marginal = {"marker": {"color": _REST}, "showlegend": False, "hoverinfo": "skip"}
    figure.add_histogram(x=x, nbinsx=60, row=1, col=1, **marginal)
    figure.add_histogram(y=y, nbinsy=60, row=2, col=2, **marginal)
    correlation = float(np.asarray(spearmanr(x, y).statistic))
    figure.update_layout(
        template=TEMPLATE,
        title=title
        or f"{own} and {other}: Jaccard of the top {k} {ours.jaccard(theirs):.2f}, rank correlation {correlation:.2f}",
        height=520,
        legend={"orientation": "h", "y": -0.14},
    )
    figure.update_xaxes(title=f"{other}, {_unit(reference)}", row=2, col=1)
    figure.update_yaxes(title=f"{own}, {_unit(scores)}", row=2, col=1)
    # Most heads do nothing: on a linear axis the one bar at 0 would hide the others.
    figure.update_yaxes(type="log", showticklabels=False, ticks="", row=1, col=1)
    figure.update_xaxes(type="log", showticklabels=False, ticks="", row=2, col=2)
    return figure


def _name(scores: HeadScores) -> str:
    return str(scores.manifest.get("family", "preference")).replace("_", " ")


def _unit(scores: HeadScores) -> str:
    return plain(scores.manifest.get("unit", "nats per token"))
