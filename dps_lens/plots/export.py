"""Figures as files: HTML and CSV always, PDF, PNG and SVG where there is a browser to print them."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, TypeAlias

import plotly.graph_objects as go

from dps_lens.errors import PlotError
from dps_lens.files import replacing, write_text
from dps_lens.plots.points import points
from dps_lens.plots.shapes import as_shapes

Column: TypeAlias = Literal["icml", "cvpr", "acl", "acl-wide", "neurips", "iclr"]
WIDTHS: dict[str, int] = {"icml": 312, "cvpr": 312, "acl": 291, "acl-wide": 605, "neurips": 528, "iclr": 528}
"""Of a column or, where there is one column only, of the text, in px; 1 px is 0.75 pt."""

FONTS = {
    "serif": "Times New Roman, Tinos, Liberation Serif, serif",
    "sans": "Helvetica, Arial, Liberation Sans, sans-serif",
}
"""Families by their kind, the first that this machine has."""

FORMATS = ("html", "csv", "pdf", "png", "svg")
_LABELS, _TICKS = 10.7, 9.3
_LONG = 40
_SCALE = 3
_HELP = (
    "export: PDF, PNG and SVG need kaleido and Chromium or Chrome: pip install kaleido, then "
    "apt-get install chromium, or plotly_get_chrome"
)


def export(
    figure: go.Figure,
    path: str | Path,
    *,
    formats: Sequence[str] = ("html", "pdf", "png"),
    column: Column | None = None,
    height: int | None = None,
    font: str | None = None,
    panel: str | None = None,
) -> list[Path]:
    """Write a figure, one file a format.

    Args:
        figure: any of `dps_lens.plots`.
        path: without an ending.
        formats: of html, csv, pdf, png and svg. HTML is self-contained; PDF and SVG are vectors with embedded fonts;
            CSV holds the numbers, as `points` gives them.
        column: fit the column width of a venue, in its sizes of letters; titles go, as a caption is there.
        height: in px, where the figure's own does not fit.
        font: of all letters: `"serif"`, `"sans"`, or a family that this machine has.
        panel: a letter that stands in bold brackets above the left edge, for figures of several panels.

    Returns:
        the files.

    Raises:
        PlotError: an unknown format or column; or no browser for a format that needs one, after the HTML is written.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise PlotError(f"export: format {unknown[0]!r} is unknown; use {', '.join(FORMATS)}")
    if column is not None and column not in WIDTHS:
        raise PlotError(f"export: column {column!r} is unknown; use {', '.join(WIDTHS)}")
    figure, path, written = go.Figure(figure), Path(path), []
    if font is not None:
        figure.update_layout(font={"family": FONTS.get(font, font)})
    path.parent.mkdir(parents=True, exist_ok=True)
    if "html" in formats:
        written.append(path.with_name(f"{path.name}.html"))
        write_text(written[0], figure.to_html(include_plotlyjs=True))
    if "csv" in formats:
        written.append(path.with_name(f"{path.name}.csv"))
        write_text(written[-1], points(figure).to_csv(index=False))
    if column is not None:
        fit(figure, WIDTHS[column])
    if height is not None:
        figure.update_layout(height=height)
    if panel is not None:
        _lettered(figure, panel)
    for name in (name for name in formats if name not in ("html", "csv")):
        file = path.with_name(f"{path.name}.{name}")
        with replacing(file) as temporary:
            temporary.write_bytes(_image(figure if name == "png" else as_shapes(figure), name))
        written.append(file)
    return written


def fit(figure: go.Figure, width: int) -> None:
    """Make a figure as wide as a column, in place: letters of 8 and 7 pt, no title, narrow margins, legend on top.

    What a colour bar says beside its unit stands above the figure.
    """
    shape = (figure.layout.height or 400) / 700
    height = max(round(width * min(max(shape, 0.62), 1.4)), 200)
    notes = _colour_bars(figure)
    figure.update_layout(
        width=width,
        height=height + 12 * len(notes),
        title=None,
        font={"size": _LABELS},
        margin={"l": 44, "r": 8, "t": 14 + 13 * len(notes), "b": 40},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": _TICKS}},
    )
    for each, room in ((figure.for_each_xaxis, width), (figure.for_each_yaxis, height)):
        each(partial(_axis, room=room))
    if notes:
        above = {"x": 0, "xref": "paper", "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "bottom", "yshift": 3}
        figure.add_annotation(text="<br>".join(notes), align="left", showarrow=False, **above)
    figure.update_annotations(font={"size": _TICKS})
    figure.for_each_trace(_smaller, selector={"type": "scatter"})


def _lettered(figure: go.Figure, letter: str) -> None:
    """A letter at the upper left corner of the picture, in place, with room for it."""
    margin = figure.layout.margin.t
    figure.update_layout(margin={"t": (100 if margin is None else margin) + 8})
    corner = {"x": 0, "xref": "paper", "xanchor": "right", "y": 1, "yref": "paper", "yanchor": "bottom"}
    size = figure.layout.font.size or 14
    figure.add_annotation(
        text=f"<b>({letter})</b>",
        showarrow=False,
        xshift=-18,
        yshift=2,
        font={"size": size, "color": "black"},
        **corner,
    )


def _colour_bars(figure: go.Figure) -> list[str]:
    bars = [figure.layout.coloraxis.colorbar]
    bars += [trace.colorbar for trace in figure.data if trace.type == "heatmap" and trace.showscale is not False]
    notes = []
    for bar in (bar for bar in bars if bar.title.text):
        first, *rest = bar.title.text.split("<br>")
        if len(bar.title.text) <= _LONG:
            first, rest = " ".join([first, *rest]), []
        notes += rest
        bar.update(thickness=8, tickfont={"size": _TICKS}, xpad=4, ypad=0)
        bar.title.update(text=first, side="right", font={"size": _TICKS})
    return notes


def _axis(axis: Any, room: int) -> None:
    """Letters for print, and a title in lines that the axis has room for."""
    letters = max(12, int(0.62 * room / (0.55 * _LABELS)))
    text = "<br>".join(wrap(axis.title.text, letters, break_long_words=False)) if axis.title.text else axis.title.text
    axis.update(
        tickfont={"size": _TICKS}, title={"text": text, "font": {"size": _LABELS}, "standoff": 4}, automargin=True
    )


def _smaller(trace: go.Scatter) -> None:
    if isinstance(trace.marker.size, int | float):
        trace.marker.size *= 0.7
    if trace.mode and "text" in trace.mode:
        trace.textfont.size = 7


@contextmanager
def browser() -> Iterator[None]:
    """Keep one browser for all exports inside: 0.3 s a figure instead of 4 s.

    Raises:
        PlotError: there is no kaleido, or no browser.
    """
    try:
        import kaleido

        kaleido.start_sync_server(mathjax=False, silence_warnings=True)
    except (ValueError, RuntimeError, ImportError) as error:
        raise PlotError(f"{_HELP} ({str(error).splitlines()[0]})") from error
    try:
        yield
    finally:
        kaleido.stop_sync_server(silence_warnings=True)


def _image(figure: go.Figure, name: str) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The kopts argument")  # plotly's own, where a server runs
            return figure.to_image(format=name, scale=_SCALE if name == "png" else 1)
    except (ValueError, RuntimeError, ImportError) as error:
        raise PlotError(f"{_HELP} ({str(error).splitlines()[0]})") from error
