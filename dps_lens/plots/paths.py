"""The graph of paths that survive: documents, heads by layer, logits."""

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from dps_lens.heads import Head
from dps_lens.plots.theme import LINES, TEMPLATE

if TYPE_CHECKING:
    import pandas

    from dps_lens.paths import PathEffects

_WIDEST, _THINNEST = 7.0, 0.8
_FACILITATING, _INTERFERING = LINES[0], LINES[1]


def paths(effects: "PathEffects", *, title: str | None = None, **options: Any) -> go.Figure:
    """Edges that differ from those of random heads of the same layers, as wide as what they carry.

    Blue edges carry something of the own profile, red ones work against it. A head is as large as its total effect.

    Args:
        effects: of `dps_lens.patch_paths`.
        title: by default what is shown.
        options: of `PathEffects.edges`.

    Returns:
        a figure; where no edge survives, it says so.
    """
    frame = effects.edges(**options)
    kept = frame[frame["survives"]]
    places = _places(effects, kept)
    figure = go.Figure()
    widest = float(kept["difference"].abs().max()) if len(kept) else 1.0
    for edge in kept.sort_values("difference", key=abs).to_dict("records"):
        _draw(figure, places, edge, _THINNEST + (_WIDEST - _THINNEST) * abs(edge["difference"]) / widest)
    _nodes(figure, effects, places)
    count = f"{len(kept)} of {len(frame)} paths survive" if len(kept) else "no path survives"
    if frame["p"].isna().all():
        count = "no claim about any, it takes six users"
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"Paths that carry the profile: {count}",
        showlegend=False,
        height=440,
        xaxis={"title": "layer", **_ticks(places)},
        yaxis={"visible": False, "range": [-1.25, 1.25]},
    )
    return figure


def _places(effects: "PathEffects", kept: "pandas.DataFrame") -> dict[str, tuple[float, float]]:
    """Documents at the left, heads at their layers, logits at the right; those of one column are spread out."""
    documents = sorted({name for name in kept["source"] if name.startswith("document")}, key=lambda name: int(name[9:]))
    columns: dict[float, list[str]] = {}
    for head in sorted(effects.nodes):
        columns.setdefault(float(head.layer), []).append(str(head))
    gap = max(1.0, (max(columns) - min(columns)) / 8)
    columns[min(columns) - gap] = documents
    columns[max(columns) + gap] = ["logits"]
    found = {}
    for order, (x, names) in enumerate(sorted(columns.items())):
        for place, name in enumerate(names):
            # Neighbouring columns are shifted, so that edges do not run through heads.
            shift = 0.0 if name == "logits" else 0.18 * (order % 3 - 1)
            found[name] = (x, shift if len(names) == 1 else 1 - 2 * place / (len(names) - 1))
    return found


def _draw(figure: go.Figure, places: dict[str, tuple[float, float]], edge: dict[str, Any], width: float) -> None:
    (x0, y0), (x1, y1) = places[edge["source"]], places[edge["target"]]
    into = "" if edge["into"] in ("resid", "attention") else f" ({edge['into']})"
    told = (
        f"{edge['source']} → {edge['target']}{into}<br>{edge['effect']:.4f} nats per token"
        f"<br>{edge['difference']:.4f} beyond random heads ({edge['difference_low']:.4f} to "
        f"{edge['difference_high']:.4f}), p {edge['p']:.4f}"
    )
    middle = ((x0 + x1) / 2, (y0 + y1) / 2)
    figure.add_scatter(
        x=[x0, middle[0], x1],
        y=[y0, middle[1], y1],
        mode="lines",
        line={"width": width, "color": _FACILITATING if edge["difference"] > 0 else _INTERFERING},
        opacity=0.65,
        text=[told] * 3,
        hovertemplate="%{text}<extra></extra>",
    )


def _nodes(figure: go.Figure, effects: "PathEffects", places: dict[str, tuple[float, float]]) -> None:
    total = effects.heads_frame().set_index("head")
    largest = float(total["total"].abs().max()) or 1.0
    names = list(places)
    sizes = [8 + 16 * abs(float(total["total"][name])) / largest if name in total.index else 10 for name in names]
    told = [
        f"{name}<br>patched: {total['total'][name]:.4f}, directly {total['direct'][name]:.4f} nats per token"
        if name in total.index
        else name
        for name in names
    ]
    figure.add_scatter(
        x=[places[name][0] for name in names],
        y=[places[name][1] for name in names],
        mode="markers+text",
        marker={"size": sizes, "color": "#ffffff", "line": {"width": 1.5, "color": "#222222"}},
        text=names,
        textposition="top center",
        textfont={"size": 10},
        customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
    )


def _ticks(places: dict[str, tuple[float, float]]) -> dict[str, Any]:
    layers = sorted({x for name, (x, _) in places.items() if name.startswith("L") and Head.parse(name).layer == x})
    return {"tickvals": layers, "ticktext": [f"{layer:.0f}" for layer in layers]}
