"""The benchmark table as a picture: every method's difference to a baseline."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dps_lens.plots.text import plain
from dps_lens.plots.theme import LINES, TEMPLATE

if TYPE_CHECKING:
    from dps_lens.evaluation.result import Evaluation


def evaluation(
    table: "Evaluation", *, metrics: Sequence[str] | None = None, baseline: str = "rag", title: str | None = None
) -> go.Figure:
    """One panel a metric, one line a method: its difference to the baseline with the 95% interval over users.

    Args:
        table: of `evaluate`.
        metrics: the task's first metric and style by default.
        baseline: a method; the dotted line.
        title: of the figure.

    Raises:
        EvaluationError: the baseline is not among the methods.
    """
    chosen = [name for name in metrics or (table.metrics[0], "style") if name in table.metrics]
    frame = table.differences(baseline)
    settings = table.choices[table.choices["chosen"]].set_index("method")["setting"]
    shown = [method for method in table.methods if method in {*frame["method"]}]
    figure = make_subplots(cols=len(chosen), shared_yaxes=True, horizontal_spacing=0.04)
    for column, metric in enumerate(chosen, start=1):
        rows = frame[frame["metric"] == metric].set_index("method").loc[shown].reset_index()
        rows["setting"] = [plain(settings.get(method, "")) for method in rows["method"]]
        figure.add_scatter(
            x=rows["mean"],
            y=list(map(plain, rows["method"])),
            error_x={"array": rows["high"] - rows["mean"], "thickness": 1.5, "width": 3},
            customdata=rows[["low", "high", "setting"]],
            mode="markers",
            marker={"color": LINES[column - 1], "size": 8},
            showlegend=False,
            hovertemplate="%{y}, setting: %{customdata[2]}<br>%{x:+.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})"
            "<extra></extra>",
            row=1,
            col=column,
        )
        figure.add_vline(x=0, line={"color": "#888888", "dash": "dot", "width": 1}, row=1, col=column)
        figure.update_xaxes(title=f"{plain(metric)}, difference to {plain(baseline)}", row=1, col=column)
    figure.update_yaxes(autorange="reversed", type="category")
    against, users = f"{table.task.name}: against {baseline}", table.rows["user"].nunique()
    figure.update_layout(
        template=TEMPLATE,
        title=title or f"{plain(against)}, 95% intervals over {users} users",
        height=130 + 26 * len(shown),
        margin={"l": 190},
    )
    return figure
