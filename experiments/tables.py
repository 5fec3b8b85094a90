"""The tables of `docs/results.md`, from the run folders of `experiments.families`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import dps_lens as dps

FULL = "full model"
Row = Mapping[str, Any]


def cell(row: Row, name: str = "mean", digits: int = 3) -> str:
    """`mean (low to high)`; nothing where it is not defined."""
    low, high = ("low", "high") if name == "mean" else (f"{name}_low", f"{name}_high")
    value, bound = row.get(name), row.get(low)
    if value is None or pd.isna(value):
        return ""
    shown = f"{value:.{digits}f}"
    if bound is not None and not pd.isna(bound):
        shown += f" ({bound:.{digits}f} to {row[high]:.{digits}f})"
    return shown.replace("-", "−")


def p_of(row: Row) -> str:
    return "" if pd.isna(row.get("p", float("nan"))) else f"{row['p']:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, *rows]
    shown = ["| " + " | ".join(str(value) for value in line) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "---|" * len(head), *shown[1:]])


class Effects:
    """One run of `ablation_curve`, `patch_heads` or `vector_recovery`."""

    def __init__(self, folder: Path) -> None:
        self.effects = dps.SetEffects.load(folder)
        self.rows = {
            part: {
                (row["family"], row["k"], row["measure"]): row
                for row in self.effects.to_frame(part=part).to_dict("records")  # type: ignore[arg-type]
            }
            for part in ("all", "copied", "rest")
        }

    def full(self) -> str:
        """NLL and gains of the full model."""
        wanted = ("NLL, own", "NLL, no_profile", "NLL, other_user", "gain", "gain (other)")
        found = [(name, self.rows["all"].get((FULL, 0, name))) for name in wanted]
        return table(["full model", "mean (95% interval)"], [[name, cell(row)] for name, row in found if row])

    def families(self) -> str:
        """Gain taken, harm and fluency of every family and K."""
        head = ["family", "K", "gain taken", "random sets (band)", "difference", "p"]
        head += ["taken of the gain over another's profile", "harm", "random sets (band)", "neutral text"]
        lines = []
        for family in self.effects.families:
            for k in self.effects.ks:
                taken, other, harm, neutral = (
                    self.rows["all"][family, k, name] for name in ("taken", "taken (other)", "harm", "neutral")
                )
                line = [family, k, cell(taken), cell(taken, "control"), cell(taken, "difference"), p_of(taken)]
                lines.append([*line, cell(other), cell(harm), cell(harm, "control"), cell(neutral)])
        return table(head, lines)

    def other(self, k: int) -> str:
        """What is taken of the gain over another user's profile, beside random sets."""
        lines = []
        for family in self.effects.families:
            row = self.rows["all"][family, k, "taken (other)"]
            lines.append([family, cell(row), cell(row, "control"), cell(row, "difference"), p_of(row)])
        head = [f"family, K = {k}", "taken of the gain over another's profile", "random sets (band)", "difference", "p"]
        return table(head, lines)

    def copying(self, k: int) -> str:
        """The gain and what is taken of it, in copied tokens and in the rest."""
        copied, rest = self.rows["copied"], self.rows["rest"]
        lines = [["full model (gain)", cell(copied[FULL, 0, "gain"]), "", cell(rest[FULL, 0, "gain"])]]
        for family in self.effects.families:
            one, two = copied[family, k, "taken"], rest[family, k, "taken"]
            lines.append([family, cell(one), cell(one, "percent", 0), cell(two)])
        return table([f"family, K = {k}", "taken, copied tokens", "per cent of their gain", "taken, the rest"], lines)

    def measures(self) -> str:
        """Every measure of every family and K, for patches and vectors."""
        lines = []
        for family in self.effects.families:
            for k in self.effects.ks:
                for name in self.effects.measures:
                    row = self.rows["all"][family, k, name]
                    line = [family, k, name, cell(row), cell(row, "control"), cell(row, "difference"), p_of(row)]
                    lines.append(line)
        return table(["family", "K", "measure", "mean", "random sets (band)", "difference", "p"], lines)


def _frame(out: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pd.read_csv(out / "tables" / f"{name}.csv").to_dict("records")  # type: ignore[assignment]
    return rows


def agreement(out: Path) -> str:
    """Top heads, overlap of families and of users."""
    tops = [[row["family"], row["top 10"].replace(",", ", ")] for row in _frame(out, "top_heads")]
    pairs = [
        [
            f"{row['a']}, {row['b']}",
            f"{row['jaccard']:.2f}",
            f"{row['null_low']:.2f} to {row['null_high']:.2f}",
            f"{row['p']:.3f}",
            f"{row['spearman']:.2f}".replace("-", "−"),
        ]
        for row in _frame(out, "overlap_families")
    ]
    users = [[row["measure"], cell(row)] for row in _frame(out, "overlap_users")]
    return "\n\n".join(
        [
            table(["family", "top 10"], tops),
            table(["pair", "Jaccard", "random sets (95%)", "p", "rank correlation"], pairs),
            table(["halves of 2 examples", "Jaccard of the top 10"], users),
        ]
    )


def where(out: Path) -> str:
    """Gain taken and harm by edited positions; attention from the response."""
    rows = {(row["positions"], row["family"], row["measure"]): row for row in _frame(out, "where")}
    lines = [
        [family, positions, cell(row), cell(rows[positions, family, "harm"])]
        for (positions, family, measure), row in rows.items()
        if measure == "taken"
    ]
    shares = {(row["family"], row["target"]): row for row in _frame(out, "attention")}
    targets = ("profile", "task", "response", "first token", "other")
    families = dict.fromkeys(family for family, _ in shares)
    attention = [[family, *(cell(shares[family, target]) for target in targets)] for family in families]
    first = table(["family, K = 10", "positions", "gain taken", "harm"], lines)
    return first + "\n\n" + table(["family", *targets], attention)


def writing(out: Path) -> str:
    """ROUGE-L without the heads."""
    lines = [
        [row["family"], cell(row), cell(row, "lost"), cell(row, "control"), cell(row, "difference")]
        for row in _frame(out, "writing")
    ]
    return table(["family, K = 10", "ROUGE-L", "lost", "random sets", "lost more than random sets"], lines)
