"""What `evaluate` returns: every answer, and the table of methods × metrics."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pandas as pd

from dps_lens.data.tasks import Task
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.metrics import METRICS, OF_EVERY_TASK, Metric, metrics_of
from dps_lens.result import Result
from dps_lens.stats.intervals import jackknife

REFERENCE = "reference"


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """Answers and what they are worth.

    Attributes:
        rows: one row an answer: `user`, `example`, `method`, `text`, `reference`, the task's metrics, `style`
            (similarity to the user's own texts minus that to other users'), `author` (probability by a classifier that
            the user wrote it, and none of the others), `NLL` (of the answer under the unsteered model without a
            profile, nats per token), `repeated` (share of 3-grams that were there before), `copied` (share of tokens
            that end a 2-gram of the user's profile), `tokens`.
            Method `"reference"` is what the user wrote.
        choices: the grid of every method, its score on discovery examples, and what was chosen.
        costs: seconds and FLOPs a token of every method, the prompt included; no rows where they were not measured.
        task: what was asked.
        manifest: settings; `metrics` and which direction of each is `better`.
    """

    stem: ClassVar[str] = "evaluation"
    figure: ClassVar[str] = "evaluation"
    error: ClassVar[type[EvaluationError]] = EvaluationError
    parts: ClassVar[tuple[type, ...]] = (Task,)

    rows: pd.DataFrame
    choices: pd.DataFrame
    costs: pd.DataFrame
    task: Task
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        users = self.rows["user"].nunique()
        return f"{', '.join(self.methods)} on {self.task.name}, {len(self.rows)} answers for {users} users"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that were asked for, then those of every task."""
        asked = self.manifest.get("metrics") or [metric.name for metric in metrics_of(self.task)]
        measured = (*asked, *OF_EVERY_TASK)
        return tuple(name for name in measured if name in self.rows or self.metric(name).summary is not None)

    def metric(self, name: str) -> Metric:
        """A metric by name; of one that somebody brought, what the manifest says."""
        return METRICS.get(name) or Metric(name, None, self.manifest["better"][name])

    @property
    def methods(self) -> tuple[str, ...]:
        """In the order of the table; what the user wrote comes last."""
        return tuple(dict.fromkeys(self.rows["method"]))

    def to_frame(self, level: float = 0.95) -> pd.DataFrame:
        """One row a method and metric: `mean` (of user means; RMSE and macro-F1 over all answers) with its interval
        over users."""
        return pd.DataFrame(
            {
                "method": method,
                "metric": metric,
                **jackknife(partial(self._value, metric), self._with(metric, rows), level),
            }
            for method, rows in self.rows.groupby("method", sort=False)
            for metric in self.metrics
            if metric in OF_EVERY_TASK or method != REFERENCE
        )

    def differences(
        self, baseline: str = "rag", level: float = 0.95, *, metrics: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """One row a method and metric: its difference to a baseline, with its interval over users.

        Paired: answers count where both have a value (an empty answer has no NLL).

        Args:
            baseline: a method.
            level: of the intervals.
            metrics: only these.

        Raises:
            EvaluationError: the baseline is not among the methods, or a metric was not measured.
        """
        asked = list(self.metrics) if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
        if unknown := [name for name in asked if name not in self.metrics]:
            raise EvaluationError(f"differences: {unknown[0]!r} is not among {', '.join(self.metrics)}")
        if baseline not in self.methods:
            raise EvaluationError(f"differences: {baseline!r} is not among {', '.join(self.methods)}")
        plain = self.rows[self.rows["method"] == baseline]
        table = []
        for method, rows in self.rows.groupby("method", sort=False):
            for metric in asked if method not in (baseline, REFERENCE) else ():
                ours, theirs = (self._with(metric, of).set_index(["user", "example"]) for of in (rows, plain))
                shared = ours.index.intersection(theirs.index)
                both = pd.concat([ours.loc[shared].assign(side=1), theirs.loc[shared].assign(side=0)]).reset_index()

                def difference(of: pd.DataFrame, metric: str = metric) -> float:
                    return self._value(metric, of[of["side"] == 1]) - self._value(metric, of[of["side"] == 0])

                table.append({"method": method, "metric": metric, **jackknife(difference, both, level)})
        return pd.DataFrame(table)

    def _value(self, metric: str, rows: pd.DataFrame) -> float:
        return self.metric(metric).of(rows, self.task)

    def _with(self, metric: str, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows that have a value."""
        return rows if self.metric(metric).summary is not None else rows.dropna(subset=metric)
