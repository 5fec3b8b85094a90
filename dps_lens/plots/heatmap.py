"""Layer × head maps of scores."""

import numpy as np
import plotly.graph_objects as go

from dps_lens.heads import Head, HeadSet
from dps_lens.plots.theme import SIGNED, TEMPLATE
from dps_lens.scores import HeadScores

_QUANTILE = 0.995


def heatmap(
    scores: HeadScores,
    *,
    user: str | None = None,
    component: str | None = None,
    heads: HeadSet | None = None,
    title: str | None = None,
) -> go.Figure:
    """Mean score of every head, with its interval and rank on hover.

    Args:
        scores: of `score_heads`.
        user: one user instead of the mean over users.
        component: `"own"`, `"no_profile"` or `"other_user"` instead of the score itself.
        heads: heads to outline.
        title: by default what is shown, of whom.

    Returns:
        a figure with one heatmap trace; blue is positive, white is zero, and colours end at the 99.5th
        percentile of |score|, which the colour bar states.
    """
    mean = scores.mean(user, of=component).numpy()
    low, high = (bound.numpy() for bound in scores.ci(0.95, user, of=component))
    rank = np.empty(mean.size, dtype=int)
    rank[np.argsort(-mean.ravel(), kind="stable")] = np.arange(1, mean.size + 1)
    unit = scores.manifest.get("unit", "nats per token")
    limit = float(np.quantile(np.abs(mean), _QUANTILE)) or 1e-9
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
            colorbar={"title": {"text": f"{unit}<br>(ends at ±{limit:.2g})"}, "thickness": 12},
            hovertemplate=(
                f"<b>%{{text}}</b><br>%{{z:.4f}} {unit}"
                "<br>95% interval %{customdata[0]:.4f} to %{customdata[1]:.4f}"
                "<br>rank %{customdata[2]} of " + str(mean.size) + "<extra></extra>"
            ),
        )
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
    figure.update_layout(
        template=TEMPLATE,
        title=title or _title(scores, user, component),
        height=max(320, 110 + 15 * layers),
        xaxis={"title": "head", "dtick": 1 if n_heads <= 16 else 4},
        yaxis={"title": "layer", "dtick": 1 if layers <= 16 else 5},
    )
    return figure


def _title(scores: HeadScores, user: str | None, component: str | None) -> str:
    if "family" in scores.manifest:
        return (
            f"{str(scores.manifest['family']).replace('_', ' ').capitalize()}: mean of {len(scores.user_ids)} prompts"
        )
    contrast = scores.manifest.get("contrast")
    names = {
        "no_profile": "PCS, own profile − no profile",
        "other_user": "PCS, own profile − other users' profiles",
    }
    name = names.get(str(contrast), "PCS")
    if component:
        name = {"own": "PCS, own profile", "no_profile": "PCS, no profile"}.get(component, f"PCS, {component}")
    rows = len(scores.rows(user)) if user else len(scores.user_ids)
    whom = f"user {user}" if user else f"mean of {len(scores.users)} users"
    return f"{name}: {whom}, {rows} examples"
