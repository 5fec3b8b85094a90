"""What a head looks at while the response is read."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from dps_lens.errors import HeadError
from dps_lens.heads import Head
from dps_lens.plots.text import plain
from dps_lens.plots.theme import TEMPLATE

if TYPE_CHECKING:
    from dps_lens.validation.attention import AttentionPattern

MAX_CIRCUITSVIS = 128
"""Tokens above which circuitsvis is slow in a browser."""

_SPANS = {"profile": "#0072B2", "task": "#D55E00", "response": "#009E73"}
_POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; font-src data:\">"
)


def attention(pattern: "AttentionPattern", head: Head | None = None, *, title: str | None = None) -> go.Figure:
    """A head's attention from every position that gives a response token to every token of the prompt.

    Args:
        pattern: of `attention_pattern`.
        head: one of its heads; the first by default.
        title: of the figure.

    Raises:
        HeadError: the head is not among them.
    """
    index, head = _index(pattern, head)
    values = pattern.pattern[index].numpy().round(4)
    start = pattern.prompt.spans["response"][0]
    pieces = [plain(piece) for piece in pattern.pieces]
    keys, queries = list(range(len(pieces))), list(range(start - 1, start - 1 + len(values)))
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=keys,
            y=[query + 1 for query in queries],
            customdata=np.broadcast_to(np.array(pieces, dtype=object), values.shape),
            text=[[pieces[query + 1]] * len(keys) for query in queries],
            zmin=0,
            zmax=float(np.quantile(values, 0.999)) or 1e-9,
            colorscale="Blues",
            colorbar={"title": {"text": "attention"}, "thickness": 12},
            hovertemplate="to <b>%{customdata}</b> (%{x})<br>writing <b>%{text}</b><br>%{z:.3f}<extra></extra>",
        )
    )
    for name, colour in _SPANS.items():
        begin, end = pattern.prompt.spans[name]
        if end > begin:
            figure.add_vrect(x0=begin - 0.5, x1=end - 0.5, fillcolor=colour, opacity=0.07, line_width=0, layer="above")
            figure.add_annotation(
                x=(begin + end) / 2,
                y=1.02,
                yref="paper",
                text=name,
                showarrow=False,
                font={"color": colour, "size": 11},
            )
    few = len(queries) <= 40
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{head}: attention from the response, {len(pieces)} tokens",
        height=180 + min(len(queries) * 14, 560),
        xaxis={"title": "position of the token attended to"},
        yaxis={
            "title": "token written",
            "autorange": "reversed",
            "automargin": True,
            **({"tickvals": [q + 1 for q in queries], "ticktext": [pieces[q + 1] for q in queries]} if few else {}),
        },
    )
    return figure


def attention_html(pattern: "AttentionPattern", *, heads: Sequence[Head] | None = None) -> str:
    """circuitsvis' attention heads as one page that needs no network; plotly above 128 tokens.

    The response's positions are the queries; what the prompt's own positions attend to is not shown. Text of the
    prompt cannot run as a script in it.

    Args:
        pattern: of `attention_pattern`.
        heads: which of its heads; all by default.

    Raises:
        HeadError: a head is not among them.
    """
    chosen = [_index(pattern, head) for head in (heads or pattern.heads)]
    if len(pattern.pieces) > MAX_CIRCUITSVIS:
        figures = [attention(pattern, head) for _, head in chosen]
        return _page(
            "".join(figure.to_html(full_html=False, include_plotlyjs=not n) for n, figure in enumerate(figures))
        )
    size, start = len(pattern.pieces), pattern.prompt.spans["response"][0]
    square = np.zeros((len(chosen), size, size))
    for place, (index, _) in enumerate(chosen):
        values = pattern.pattern[index].numpy()
        square[place, start - 1 : start - 1 + len(values)] = values
    properties = {
        "tokens": list(pattern.pieces),
        "attention": square.round(4).tolist(),
        "attentionHeadNames": [str(head) for _, head in chosen],
    }
    # Nothing in JSON needs a bare "<"; escaped, no text can end the script element.
    data = json.dumps(properties).replace("<", "\\u003c")
    render = f"CircuitsVis.render('heads', CircuitsVis.AttentionHeads, {data})"
    return _page(f"<div id='heads'></div><script>{_script()}</script><script>{render}</script>")


@cache
def _script() -> str:
    """circuitsvis' own script, from the installed package, safe inside a script element."""
    import circuitsvis

    script = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    return re.sub(r"</(?=script)", r"<\\/", script.read_text(encoding="utf-8"), flags=re.IGNORECASE)


def _page(body: str) -> str:
    head = f"<head><meta charset='utf-8'>{_POLICY}<title>Attention</title></head>"
    return f"<!doctype html><html>{head}<body>{body}</body></html>"


def _index(pattern: "AttentionPattern", head: Head | None) -> tuple[int, Head]:
    head = pattern.heads[0] if head is None else Head(*head)
    if head not in pattern.heads:
        raise HeadError(f"plots.attention: {head} is not among {', '.join(map(str, pattern.heads))}")
    return pattern.heads.index(head), head
