"""Frames as Markdown, in which the bounds of an interval stand in brackets behind their value."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import pandas as pd

Row: TypeAlias = Mapping[Any, Any] | pd.Series


def ends(row: Row, name: str = "mean") -> dict[str, float]:
    """The interval of a column."""
    low, high = ("low", "high") if name == "mean" else (f"{name}_low", f"{name}_high")
    return {end: row.get(column, float("nan")) for end, column in (("mean", name), ("low", low), ("high", high))}


def cell(row: Row, name: str = "mean", digits: int = 3) -> str:
    """`mean (low to high)`; nothing where it is not defined."""
    value, low, high = ends(row, name).values()
    if pd.isna(value):
        return ""
    shown = f"{value:.{digits}f}"
    if not pd.isna(low):
        shown += f" ({low:.{digits}f} to {high:.{digits}f})"
    return shown.replace("-", "−")


def markdown(frame: pd.DataFrame) -> str:
    bounds = {column for column in frame.columns if column in ("low", "high") or column.endswith(("_low", "_high"))}
    shown = [column for column in frame.columns if column not in bounds]
    rows = [shown, *([_shown(row, column) for column in shown] for row in frame.to_dict("records"))]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(shown), *lines[1:]])


def _shown(row: Row, column: str) -> str:
    if not isinstance(row[column], float):
        return str(row[column])
    # p-values by permutation need a digit more than effects do not.
    return cell(row, column, 4 if column == "p" or column.startswith("p ") else 3)
