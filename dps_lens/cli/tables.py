"""Tables on the terminal; what they show is text, never markup or codes for the terminal."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    from rich.console import Console
    from rich.table import Table

    from dps_lens.dossier import Dossier
    from dps_lens.evaluation import Evaluation
    from dps_lens.found import FoundHeads
    from dps_lens.paths import PathEffects
    from dps_lens.scores import HeadScores
    from dps_lens.stats import Overlap
    from dps_lens.validation import Faithfulness, SetEffects


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
    # A single component is the score itself.
    shown = scores.components if len(scores.components) > 1 else {}
    for column in ("head", "score", "interval", *shown):
        table.add_column(printable(column), justify="left" if column == "head" else "right")
    for row in scores.to_frame().head(k).to_dict("records"):
        parts = [f"{row[name]:.4f}" for name in shown]
        _add(table, row["name"], f"{row['mean']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}", *parts)
    _console().print(table)


def print_found(found: "FoundHeads") -> None:
    """The set with its inclusion frequencies, and what it was measured to do."""
    from rich.table import Table

    n = len(found.resampled)
    table = Table(title=printable(f"{len(found.heads)} heads, chosen on {len(found.users)} users"))
    shares = (f"in resamples (of {n})", "95% over resamples") if n else ()
    for column in ("place", "head", "value", *shares, f"in folds (of {len(found.folds)})"):
        table.add_column(printable(column), justify="left" if column == "head" else "right")
    frame = found.to_frame()
    for row in frame[frame["place"].notna()].to_dict("records"):
        share = [f"{row['inclusion']:.0%}", f"{row['low']:.0%} to {row['high']:.0%}"] if n else []
        _add(table, row["place"], row["name"], f"{row['value']:.4f}", *share, row["folds"])
    console = _console()
    console.print(table)
    unit = found.manifest.get("unit", "nats per token")
    costs = "" if unit == "nats per token" else ", costs in nats per token"
    table = Table(title=printable(f"Discovery examples: {unit}{costs}, 95% interval over users"))
    for column in ("sample", "measure", "mean", "interval"):
        table.add_column(column, justify="left" if column in ("sample", "measure") else "right")
    for row in found.evidence().to_dict("records"):
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        _add(table, row["sample"], row["measure"], f"{row['mean']:.3f}", interval)
    console.print(table)


def print_answers(frame: "pandas.DataFrame", summary: str) -> None:
    """One row a condition and measure, and what the own profile adds."""
    from rich.table import Table

    table = Table(title=printable(f"{summary}, 95% interval over users"))
    for column in ("profile", "measure", "mean", "interval"):
        table.add_column(column, justify="left" if column in ("profile", "measure") else "right")
    for row in frame.to_dict("records"):
        measure = row["measure"] if row["unit"] == "share" else f"{row['measure']}, {row['unit']}"
        _add(table, row["condition"], measure, f"{row['mean']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}")
    _console().print(table)


def print_cost(cost: "SetEffects") -> None:
    """The full model, then one row a measure: of the set, of its random sets, and the difference; and the verdict."""
    from rich.table import Table

    from dps_lens.validation.effects import FULL

    console, frame = _console(), cost.beside_random()
    rows = frame.to_dict("records")
    intervals = "95% intervals over users (of a difference, also over random sets)"
    console.print(printable(f"Held-out examples: {_units(cost)}, {intervals}"))
    for row in (row for row in rows if row["ablated"] == FULL):
        console.print(printable(f"{row['measure']}: {row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"))
    sets = [name for name in dict.fromkeys(frame["ablated"]) if name != FULL]
    cells = {
        (row["measure"], row["ablated"]): f"{row['mean']:.3f}\n{row['low']:.3f} to {row['high']:.3f}" for row in rows
    }
    table = Table()
    for column in ("measure", *sets):
        table.add_column(printable(column), justify="left" if column == "measure" else "right")
    for measure in dict.fromkeys(row["measure"] for row in rows if row["ablated"] != FULL):
        _add(table, measure, *(cells.get((measure, name), "") for name in sets))
    console.print(table)
    console.print(printable(cost.verdict()))


def print_faithfulness(curves: "Faithfulness") -> None:
    """One row a ranking: its areas, beside those of random rankings; then f at every size."""
    from rich.table import Table

    console, gain = _console(), curves.gain()
    console.print(f"gain: {gain['mean']:.3f} ({gain['low']:.3f} to {gain['high']:.3f}) {curves.unit}")
    if undefined := curves.undefined():
        console.print(printable(f"no faithfulness: {undefined}"))
        return
    table = Table(title="Areas over the share of heads, 95% intervals over users")
    for column in ("family", "CPR", "next random (95%)", "p", "CMD", "next random (95%) ", "p "):
        table.add_column(printable(column), justify="left" if column == "family" else "right")
    for row in curves.areas().to_dict("records"):
        cells = []
        for name in ("CPR", "CMD"):
            interval, random = (_range(row, f"{name}{of}") for of in ("", "_control"))
            cells += [f"{_number(row, name)} ({interval})" if interval else "", random, _number(row, f"{name}_p")]
        _add(table, row["family"], *cells)
    console.print(table)
    frame = curves.to_frame()
    table = Table(title="Faithfulness f, by heads kept")
    for column in ("heads", *curves.families, "random, mean"):
        table.add_column(printable(column), justify="right")
    for (size, count), rows in frame[frame["n_heads"] > 0].groupby(["size", "n_heads"]):
        found = rows.to_dict("records")
        cells = [*(_number(row, "f") for row in found), _number(found[0], "control")]
        _add(table, f"{count} ({100 * size:g}%)", *cells)
    console.print(table)
    if curves.no_range:
        console.print(curves.no_range)


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
    """What is removed, both costs and patches side by side, then each measure beside the random sets."""
    from rich.table import Table

    from dps_lens.validation.effects import FULL
    from dps_lens.validation.measures import MEASURES

    frame = effects.to_frame()
    console = _console()
    for row in frame[frame["family"] == FULL].to_dict("records"):
        interval = "" if math.isnan(row["low"]) else f" ({_ends(row)})"
        console.print(printable(f"{row['measure']}: {row['mean']:.3f}{interval} {effects.unit_of(row['measure'])}"))
    shown = [name for name in effects.measures if not MEASURES[name].left]
    console.print(_side_by_side(effects, frame, shown))
    for measure in shown:
        table = Table(title=f"{measure}, {effects.unit_of(measure)}, 95% intervals over users")
        for column in ("family", "K", "mean", "interval", "next random set (95%)", "difference", "interval ", "p"):
            table.add_column(printable(column), justify="left" if column == "family" else "right")
        for row in frame[(frame["measure"] == measure) & (frame["family"] != FULL)].to_dict("records"):
            cells = [row["family"], str(row["k"]), f"{row['mean']:.3f}", _ends(row)]
            cells += [
                _range(row, "control"),
                _number(row, "difference"),
                _range(row, "difference"),
                _number(row, "p"),
            ]
            _add(table, *cells)
        console.print(table)
    if effects.no_range:
        console.print(effects.no_range)


def _units(effects: "SetEffects") -> str:
    """The unit of all measures, or of what is removed and of costs."""
    removed, costs = (effects.unit_of(name) for name in ("gain_removed", "task_cost"))
    return removed if removed == costs else f"{removed}, costs in {costs}"


def _side_by_side(effects: "SetEffects", frame: "pandas.DataFrame", measures: Sequence[str]) -> "Table":
    """One row a family and K; a sign where a measure can be told from random sets."""
    from rich.box import SIMPLE
    from rich.table import Table

    from dps_lens.validation.verdict import stands_out

    told = ": +, −: more, less than random sets do (each one-sided, 5%)" if effects.n_random else ""
    title = printable(f"Means, {_units(effects)}{told}")
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("family", "K", *(name.replace("_", " ") for name in measures)):
        table.add_column(printable(column), justify="left" if column == "family" else "right", overflow="fold")
    rows = {(row["family"], row["k"], row["measure"]): row for row in frame.to_dict("records")}
    for family in effects.families:
        for k in effects.ks:
            of = [rows[family, k, measure] for measure in measures]
            _add(table, family, k, *(f"{row['mean']:.3f}{' +−'[stands_out(row)]}" for row in of))
    return table


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


def _range(row: Mapping[Hashable, Any], name: str) -> str:
    """`NAME_low` to `NAME_high`, or nothing where one is missing or NaN."""
    ends = [_number(row, f"{name}_{end}") for end in ("low", "high")]
    return " to ".join(ends) if all(ends) else ""


def _ends(row: Mapping[Hashable, Any]) -> str:
    """`low` to `high`; nothing for one user, who has no interval."""
    return "" if math.isnan(row["low"]) else f"{row['low']:.3f} to {row['high']:.3f}"


def _number(row: Mapping[Hashable, Any], name: str) -> str:
    """Three digits, or nothing where the number is missing or NaN."""
    return f"{row[name]:.3f}" if name in row and not math.isnan(row[name]) else ""


def print_dossier(found: "Dossier") -> None:
    """What a head reads and writes beside random heads of its layer, and its rank in other families."""
    from rich.table import Table

    users = len(dict.fromkeys(found.user_ids))
    table = Table(title=printable(f"{found.head} on {users} users, 95% intervals; others: {len(found.controls)} heads"))
    for column in ("section", "measure", "mean", "interval", "others"):
        table.add_column(column, justify="left" if column in ("section", "measure") else "right")
    for row in found.to_frame().to_dict("records"):
        interval = _ends(row)
        others = "" if math.isnan(row["control"]) else f"{row['control']:.3f}"
        _add(table, row["section"], row["measure"], f"{row['mean']:.3f}", interval, others)
    console = _console()
    console.print(table)
    if found.ranks:
        table = Table(title="Rank in other families")
        for column in ("family", "score", "rank", "median"):
            table.add_column(column, justify="left" if column == "family" else "right")
        for row in found.families().to_dict("records"):
            place = f"{row['rank']:.0f} of {row['heads']:.0f}"
            _add(table, row["family"], f"{row['score']:.4f}", place, f"{row['median']:.4f}")
        console.print(table)
    console.print(printable(f"{found.head} is {found.role}"))
    readers = ", ".join(f"{head} ({into}, {overlap:.2f})" for head, into, overlap in found.readers)
    console.print(printable(f"read most by: {readers or 'nobody, it is in the last layer'}"))
    console.print(printable(f"raises most: {', '.join(map(repr, found.raised))}"))
    console.print(printable(f"lowers most: {', '.join(map(repr, found.lowered))}"))


def print_edges(found: "PathEffects") -> None:
    """The paths that survive, and how many were looked at."""
    from rich.table import Table

    frame = found.edges()
    kept = frame[frame["survives"]]
    if frame["p"].isna().all():
        _console().print(
            printable(f"{len(frame)} paths; no claim about any: it takes six users and another head in each layer")
        )
        return
    table = Table(title=printable(f"{len(kept)} of {len(frame)} paths survive: nats per token, 95% over users"))
    for column in ("source", "target", "into", "effect", "interval", "random heads", "p"):
        table.add_column(column, justify="left" if column in ("source", "target", "into") else "right")
    for row in kept.to_dict("records"):
        interval = f"{row['effect_low']:.4f} to {row['effect_high']:.4f}"
        numbers = (f"{row['effect']:.4f}", interval, f"{row['control']:.4f}", f"{row['p']:.4f}")
        _add(table, row["source"], row["target"], row["into"], *numbers)
    _console().print(table)
