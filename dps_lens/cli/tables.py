"""Tables on the terminal; what they show is text, never markup or codes for the terminal."""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dps_lens.evaluation import Evaluation
    from dps_lens.found import FoundHeads
    from dps_lens.scores import HeadScores
    from dps_lens.stats import Overlap
    from dps_lens.validation import SetEffects


def printable(text: object) -> str:
    """A text with what a terminal would obey written as it is in Python: `\\x1b`."""
    shown = (one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in str(text))
    return "".join(shown)


def _console() -> "Console":
    from rich.console import Console

    return Console(markup=False, emoji=False)


def _add(table: "Table", *cells: object) -> None:
    table.add_row(*map(printable, cells))


def print_top(scores: "HeadScores", k: int) -> None:
    from rich.table import Table

    from dps_lens.stats.skew import caveat

    unit = scores.manifest.get("unit", "nats per token")
    about = caveat(scores.skewness().numpy(), len(scores.users))
    title = printable(f"Top {k} heads ({unit}, 95% interval over {len(scores.users)} users)")
    table = Table(title=title, caption=about or None)
    for column in ("head", "score", "interval", *scores.components):
        table.add_column(printable(column), justify="left" if column == "head" else "right")
    for row in scores.to_frame().head(k).to_dict("records"):
        parts = [f"{row[name]:.4f}" for name in scores.components]
        _add(table, row["name"], f"{row['mean']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}", *parts)
    _console().print(table)


def print_found(found: "FoundHeads") -> None:
    """The set with its inclusion frequencies, and what it was measured to do."""
    from rich.table import Table

    n = len(found.resampled)
    table = Table(title=printable(f"{len(found.heads)} heads, chosen on {len(found.users)} users"))
    for column in ("place", "head", "value", f"in resamples (of {n})", "interval", f"in folds (of {len(found.folds)})"):
        table.add_column(printable(column), justify="left" if column == "head" else "right")
    frame = found.to_frame()
    for row in frame[frame["place"].notna()].to_dict("records"):
        share = [f"{row['inclusion']:.0%}", f"{row['low']:.0%} to {row['high']:.0%}"] if n else ["", ""]
        _add(table, row["place"], row["name"], f"{row['value']:.4f}", *share, row["folds"])
    console = _console()
    console.print(table)
    table = Table(title="Discovery examples: nats per token, 95% interval over users")
    for column in ("sample", "measure", "mean", "interval"):
        table.add_column(column, justify="left" if column in ("sample", "measure") else "right")
    for row in found.evidence().to_dict("records"):
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        _add(table, row["sample"], row["measure"], f"{row['mean']:.3f}", interval)
    console.print(table)


def print_cost(cost: "SetEffects") -> None:
    from rich.table import Table

    table = Table(
        title="Held-out examples: nats per token, 95% interval over users (of a difference, also over random sets)"
    )
    for column in ("ablated", "measure", "mean", "interval"):
        table.add_column(printable(column), justify="left" if column in ("ablated", "measure") else "right")
    for row in cost.beside_random().to_dict("records"):
        _add(table, row["ablated"], row["measure"], f"{row['mean']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}")
    console = _console()
    console.print(table)
    console.print(printable(cost.verdict()))


def print_overlap(overlap: "Overlap", title: str) -> None:
    """One row a pair: overlap, what chance gives, rank correlation."""
    from rich.table import Table

    table = Table(title=printable(title))
    for column in ("pair", "Jaccard", "chance (95%)", "p", "rank correlation"):
        table.add_column(printable(column), justify="left" if column == "pair" else "right")
    for row in overlap.to_frame().to_dict("records"):
        _add(
            table,
            f"{row['a']}, {row['b']}",
            f"{row['jaccard']:.2f}",
            f"{row['null_low']:.2f} to {row['null_high']:.2f}",
            f"{row['p']:.3f}",
            f"{row['spearman']:.2f}",
        )
    _console().print(table)


def print_effects(effects: "SetEffects") -> None:
    """One row a family and K: what it measures, beside the random sets."""
    from rich.table import Table

    frame = effects.to_frame()
    console = _console()
    for row in frame[frame["family"] == "full model"].to_dict("records"):
        interval = f"({row['low']:.3f} to {row['high']:.3f})"
        console.print(f"{row['measure']}: {row['mean']:.3f} {interval} nats per token")
    shown = [name for name in ("gain_removed", "task_cost", "necessity", "sufficiency") if name in effects.measures]
    for measure in shown:
        table = Table(title=f"{measure}, nats per token, 95% intervals over users")
        for column in ("family", "K", "mean", "interval", "next random set (95%)", "difference", "interval ", "p"):
            table.add_column(printable(column), justify="left" if column == "family" else "right")
        for row in frame[(frame["measure"] == measure) & (frame["family"] != "full model")].to_dict("records"):
            cells = [row["family"], str(row["k"]), f"{row['mean']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
            cells += [
                _span(row, "control_low", "control_high"),
                f"{row['difference']:.3f}" if "difference" in row else "",
                _span(row, "difference_low", "difference_high"),
                f"{row['p']:.3f}" if "p" in row else "",
            ]
            _add(table, *cells)
        console.print(table)
    if effects.no_range:
        console.print(effects.no_range)


def print_evaluation(evaluation: "Evaluation", baseline: str) -> None:
    """One row a method: the task's first metric and its difference to the baseline, style, NLL and time; settings."""
    from rich.table import Table

    means = evaluation.to_frame().set_index(["method", "metric"]).to_dict("index")
    changes = evaluation.differences(baseline).set_index(["method", "metric"]).to_dict("index")
    first = evaluation.metrics[0]
    shown = [first, *(name for name in ("style", "NLL") if name in evaluation.metrics)]
    table = Table(title=printable(f"{evaluation.task.name}: means over users, 95% intervals"))
    for column in ("method", first, f"to {baseline}", *shown[1:], "s a token"):
        name = column == "method"  # import paths are long
        table.add_column(printable(column), justify="left" if name else "right", no_wrap=not name, overflow="fold")
    seconds = evaluation.costs.set_index("method")["seconds a token"]
    for method in evaluation.methods:
        change = changes.get((method, first))
        difference = f"{change['mean']:+.3f} ({change['low']:.3f} to {change['high']:.3f})" if change else ""
        of = [means.get((method, name)) for name in shown]
        measured = [f"{one['mean']:.3f}" if one else "" for one in of]
        cost = f"{seconds[method]:.3f}" if method in seconds.index else ""
        _add(table, method, measured[0], difference, *measured[1:], cost)
    console = _console()
    console.print(table)
    grids = evaluation.choices.groupby("method", sort=False)
    for method, grid in ((method, grid) for method, grid in grids if len(grid) > 1):
        console.print(printable(f"{method}: {grid[grid['chosen']]['setting'].iloc[0]}, chosen from {len(grid)}"))


def _span(row: Mapping[Hashable, Any], low: str, high: str) -> str:
    """An interval, or nothing where too few random sets give none."""
    return f"{row[low]:.3f} to {row[high]:.3f}" if low in row else ""
