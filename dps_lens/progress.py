"""Progress of long work: a bar where somebody looks, a line now and then where a file is written."""

import importlib.util
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import tqdm

QUIET = "DPS_LENS_QUIET"
"""The environment variable that silences all progress."""

T = TypeVar("T")

_STEPS: ContextVar[bool] = ContextVar("steps of a unit are shown", default=False)
_FIRST_LINE, _LINES_APART = 10.0, 30.0  # seconds


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    shown: bool = True,
    leave: bool = True,
) -> Any:
    """A tqdm bar: in a terminal, and in a notebook, with widgets where ipywidgets is installed.

    Elsewhere, as in a log file, work that takes longer than ten seconds writes a line, another one every half minute,
    and one when it ends.

    Args:
        items: to go through, if any.
        desc: what is done.
        total: of how many.
        initial: that were done before.
        unit: what is counted.
        shown: at all; nothing is shown where `DPS_LENS_QUIET` is set, and not 0.
        leave: the bar stays when its work is done.
    """
    options: dict[str, Any] = {"iterable": items, "desc": desc, "total": total, "initial": initial, "unit": unit}
    options["leave"] = leave
    if not shown or os.environ.get(QUIET, "0") != "0":
        return tqdm.tqdm(disable=True, **options)
    if _in_notebook():
        if importlib.util.find_spec("ipywidgets") is not None:
            from tqdm.notebook import tqdm as with_widgets

            return with_widgets(disable=False, **options)
        return tqdm.tqdm(ncols=80, **options)
    return tqdm.tqdm(**options) if sys.stderr is not None and sys.stderr.isatty() else _Lines(**options)


@contextmanager
def showing_steps(shown: bool) -> Iterator[None]:
    """Whether long steps inside a unit of work show bars of their own, until the context is left."""
    token = _STEPS.set(shown)
    try:
        yield
    finally:
        _STEPS.reset(token)


def step_bar(items: Iterable[T], *, desc: str, total: int) -> Iterable[T]:
    """Go through the steps of a unit of work, below the bar of the units; shown where `showing_steps` says so."""
    shown: Iterable[T] = progress_bar(items, desc=desc, total=total, unit="step", shown=_STEPS.get(), leave=False)
    return shown


def _in_notebook() -> bool:
    """Whether the kernel of a notebook runs this."""
    shell = sys.modules.get("IPython")
    return shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None


class _Lines(tqdm.tqdm):
    """A bar that is written line by line."""

    def __init__(self, **options: Any) -> None:
        form = "{desc}: {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
        super().__init__(mininterval=_FIRST_LINE, miniters=1, delay=_FIRST_LINE, bar_format=form, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """A line instead of the last line anew."""
        self.mininterval = _LINES_APART
        self.fp.write(f"{self if msg is None else msg}\n")
        self.fp.flush()

    def close(self) -> None:
        """The last line, where the work was long and no line says as much; a bar would end its line here."""
        if not self.disable and time.time() >= self.start_t + _FIRST_LINE and self.n > self.last_print_n:
            self.display()
        self.disable = True
