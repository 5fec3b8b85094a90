"""The dossier of a head: bars beside the random heads of its layer, and the tokens that need it."""

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dps_lens.plots.painted import painted
from dps_lens.plots.text import plain
from dps_lens.plots.theme import LINES, TEMPLATE

if TYPE_CHECKING:
    import pandas

    from dps_lens.dossier import Dossier

_PANELS = {"reads": "share of attention", "writes": "nats, or logits, per token", "per token": "nats per token"}


def dossier(found: "Dossier", *, title: str | None = None, **options: Any) -> go.Figure:
    """What a head reads, writes and is needed for, with intervals over users; random heads of its layer are squares.

    Args:
        found: of `dps_lens.describe_head`.
        title: by default the head.
        options: of `Dossier.to_frame`.

    Returns:
        a figure with three panels.
    """
    frame = found.to_frame(**options)
    frame = frame.assign(panel=frame["section"].replace({"reads, otherwise": "reads"}))
    figure = make_subplots(rows=1, cols=len(_PANELS), subplot_titles=list(_PANELS), horizontal_spacing=0.2)
    most = 0
    for place, (panel, unit) in enumerate(_PANELS.items(), start=1):
        rows = frame[(frame["panel"] == panel) & ~frame["measure"].str.startswith("direction,")]
        most = max(most, len(rows))
        _panel(figure, rows, str(found.head), place)
        figure.update_xaxes(title=unit, zeroline=True, zerolinecolor="#bbbbbb", row=1, col=place)
        figure.update_yaxes(autorange="reversed", row=1, col=place)
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{found.head} beside {len(found.controls)} heads of its layer",
        height=160 + 24 * most,
        margin={"l": 210, "t": 76},
        legend={"orientation": "h", "y": -0.2},
    )
    figure.update_annotations(font_size=12)
    return figure


def token_effects(found: "Dossier", row: int = 0, *, title: str | None = None) -> go.Figure:
    """The tokens of one response, coloured by how much likelier the head makes them.

    Args:
        found: of `dps_lens.describe_head`.
        row: which example.
        title: by default the head and the example.
    """
    pieces, changes = found.pieces[row], found.changes[row]
    hover = [
        f"<b>{plain(piece)}</b><br>patched, its loss changes by {change:+.3f} nats"
        for piece, change in zip(pieces, changes, strict=True)
    ]
    about = f"{plain(found.user_ids[row])}, {plain(found.example_ids[row])}"
    return painted(
        changes,
        pieces,
        hover,
        title=title or f"What {found.head} does for each token: {about}",
        scale="loss patched − own (nats)",
    )


def _panel(figure: go.Figure, rows: "pandas.DataFrame", head: str, place: int) -> None:
    names = [plain(name) for name in rows["measure"]]
    figure.add_scatter(
        x=rows["mean"],
        y=names,
        error_x={"array": rows["high"] - rows["mean"], "arrayminus": rows["mean"] - rows["low"], "width": 3},
        mode="markers",
        marker={"color": LINES[0], "size": 8},
        name=head,
        legendgroup="head",
        showlegend=place == 1,
        row=1,
        col=place,
    )
    figure.add_scatter(
        x=rows["control"],
        y=names,
        mode="markers",
        marker={"color": LINES[1], "symbol": "square-open", "size": 8},
        name="other heads of the layer",
        legendgroup="others",
        showlegend=place == 1,
        row=1,
        col=place,
    )
