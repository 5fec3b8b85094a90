"""What `evaluate` returns: every answer, and the table of methods × metrics."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from dps_lens.data.tasks import TASKS, Task
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.metrics import OVER_ALL, all_metrics, jackknife, summary_of
from dps_lens.files import write_json

if TYPE_CHECKING:
    import plotly.graph_objects

REFERENCE = "reference"
OTHERS = ("style", "NLL", "repeated", "tokens")
"""Measures of every task, beside its own metrics; closed tasks have no style."""

_FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """Answers and what they are worth.

    Attributes:
        rows: one row an answer: `user`, `example`, `method`, `text`, `reference`, the task's metrics, `style`
            (similarity to the user's own texts minus that to other users'), `NLL` (of the answer under the unsteered
            model without a profile, nats per token), `repeated` (share of 3-grams that were there before), `tokens`.
            Method `"reference"` is what the user wrote.
        choices: the grid of every method, its score on discovery examples, and what was chosen.
        costs: seconds and FLOPs a token of every method, the prompt included.
        task: what was asked.
        manifest: settings.
    """

    rows: pd.DataFrame
    choices: pd.DataFrame
    costs: pd.DataFrame
    task: Task
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The task's metrics that were measured, then those of every task."""
        measured = (*all_metrics(self.task), *OTHERS)
        return tuple(name for name in measured if name in self.rows or name in OVER_ALL)

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order of the table; what the user wrote comes last."""
        return tuple(dict.fromkeys(self.rows["method"]))

    def to_frame(self, level: float = 0.95) -> pd.DataFrame:
        """One row a method and metric: `mean` (of user means; RMSE and macro-F1 over all answers) with its interval
        over users."""
        return pd.DataFrame(
            {"method": method, "metric": metric, **jackknife(summary_of(metric, self.task), _with(metric, rows), level)}
            for method, rows in self.rows.groupby("method", sort=False)
            for metric in self.metrics
            if metric in OTHERS or method != REFERENCE
        )

    def differences(self, baseline: str = "rag", level: float = 0.95) -> pd.DataFrame:
        """One row a method and metric: its difference to a baseline, with its interval over users.

        Paired: answers count where both have a value (an empty answer has no NLL).

        Raises:
            EvaluationError: the baseline is not among the methods.
        """
        if baseline not in self.methods:
            raise EvaluationError(f"differences: {baseline!r} is not among {', '.join(self.methods)}")
        plain = self.rows[self.rows["method"] == baseline]
        found = []
        for method, rows in self.rows.groupby("method", sort=False):
            for metric in self.metrics if method not in (baseline, REFERENCE) else ():
                summary = summary_of(metric, self.task)
                ours, theirs = (_with(metric, of).set_index(["user", "example"]) for of in (rows, plain))
                shared = ours.index.intersection(theirs.index)
                both = pd.concat([ours.loc[shared].assign(side=1), theirs.loc[shared].assign(side=0)]).reset_index()

                def difference(of: pd.DataFrame, summary: Any = summary) -> float:
                    return summary(of[of["side"] == 1]) - summary(of[of["side"] == 0])

                found.append({"method": method, "metric": metric, **jackknife(difference, both, level)})
        return pd.DataFrame(found)

    def plot(self, **options: Any) -> "plotly.graph_objects.Figure":
        """`dps_lens.plots.evaluation` of this table."""
        from dps_lens.plots import evaluation

        return evaluation(self, **options)

    @staticmethod
    def remove(folder: str | Path) -> None:
        """Delete what `save` wrote."""
        (Path(folder) / _FILE).unlink(missing_ok=True)

    def save(self, folder: str | Path) -> None:
        """Write rows, choices, costs and manifest; `load` reads them."""
        folder = Path(folder)
        parts = {name: getattr(self, name).to_dict("split", index=False) for name in ("rows", "choices", "costs")}
        write_json(folder / _FILE, {**parts, "task": self.task.name, "manifest": self.manifest})

    @classmethod
    def load(cls, folder: str | Path) -> "Evaluation":
        """Read what `save` wrote.

        Raises:
            EvaluationError: the folder holds no whole evaluation.
        """
        try:
            found = json.loads((Path(folder) / _FILE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise EvaluationError(
                f"{folder} holds no whole evaluation ({type(error).__name__}); start evaluate(…, out=…) there again"
            ) from error
        rows, choices, costs = (pd.DataFrame(**found[name]) for name in ("rows", "choices", "costs"))
        return cls(rows, choices, costs, TASKS[found["task"]], found["manifest"])


def _with(metric: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that have a value."""
    return rows if metric in OVER_ALL else rows.dropna(subset=metric)
