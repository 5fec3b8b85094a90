"""Figures as files: HTML always, PDF, PNG and SVG where there is a browser to print them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import plotly.graph_objects as go

from dps_lens.errors import PlotError
from dps_lens.files import replacing, write_text
from dps_lens.plots.vector import as_shapes

Column: TypeAlias = Literal["icml", "cvpr", "acl", "acl-wide", "neurips", "iclr"]
WIDTHS: dict[str, int] = {"icml": 312, "cvpr": 312, "acl": 291, "acl-wide": 605, "neurips": 528, "iclr": 528}
"""Of a column or, where there is one column only, of the text, in px; 1 px is 0.75 pt."""

FORMATS = ("html", "pdf", "png", "svg")
_LABELS, _TICKS = 10.7, 9.3
_SCALE = 3
_HELP = (
    "export: PDF, PNG and SVG need kaleido and Chromium or Chrome: pip install 'dps_lens[figures]', then "
    "apt-get install chromium, or plotly_get_chrome"
)


def export(
    figure: go.Figure,
    path: str | Path,
    *,
    formats: Sequence[str] = ("html", "pdf", "png"),
    column: Column | None = None,
    height: int | None = None,
) -> list[Path]:
    """Write a figure, one file a format.

    Args:
        figure: any of `dps_lens.plots`.
        path: without an ending.
        formats: of html, pdf, png and svg. HTML is self-contained; PDF and SVG are vectors with embedded fonts.
        column: fit the column width of a venue, in its sizes of letters; titles go, as a caption is there.
        height: in px, where the figure's own does not fit.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    if "html" in formats:
        written.append(path.with_name(f"{path.name}.html"))
        write_text(written[0], figure.to_html(include_plotlyjs=True))
    if column is not None:
        fit(figure, WIDTHS[column])
    if height is not None:
        figure.update_layout(height=height)
    for name in (name for name in formats if name != "html"):
        file = path.with_name(f"{path.name}.{name}")
        with replacing(file) as temporary:
            temporary.write_bytes(_image(figure if name == "png" else as_shapes(figure), name))
        written.append(file)
    return written


def fit(figure: go.Figure, width: int) -> None:
    """Make a figure as wide as a column, in place: letters of 8 and 7 pt, no title, narrow margins."""
    shape = (figure.layout.height or 400) / 700
    figure.update_layout(
        width=width,
        height=max(round(width * min(max(shape, 0.55), 1.4)), 180),
        title=None,
        font={"size": _LABELS},
        margin={"l": 44, "r": 8, "t": 14, "b": 40},
    )
    figure.update_xaxes(tickfont={"size": _TICKS}, title={"font": {"size": _LABELS}, "standoff": 4})
    figure.update_yaxes(tickfont={"size": _TICKS}, title={"font": {"size": _LABELS}, "standoff": 4})
    figure.update_annotations(font={"size": _TICKS})
    bars = [figure.layout.coloraxis.colorbar]
    bars += [trace.colorbar for trace in figure.data if trace.type == "heatmap" and trace.showscale is not False]
    for bar in bars:
        if bar.title.text:
            bar.update(thickness=8, tickfont={"size": _TICKS}, xpad=4, ypad=0)
            title = {"text": bar.title.text.replace("<br>", " "), "side": "right", "font": {"size": _TICKS}}
            bar.title.update(title)


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
        return figure.to_image(format=name, scale=_SCALE if name == "png" else 1)
    except (ValueError, RuntimeError, ImportError) as error:
        raise PlotError(f"{_HELP} ({str(error).splitlines()[0]})") from error
