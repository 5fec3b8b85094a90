"""Figures: plotly, returned, never shown."""

from dps_lens.plots.ablation import ablation
from dps_lens.plots.evaluation import evaluation
from dps_lens.plots.heatmap import heatmap
from dps_lens.plots.overlap import overlap
from dps_lens.plots.report import verdict, write_report
from dps_lens.plots.stability import stability_curve
from dps_lens.plots.steering import steering
from dps_lens.plots.theme import TEMPLATE
from dps_lens.plots.token_shift import token_shift

__all__ = [
    "TEMPLATE",
    "ablation",
    "evaluation",
    "heatmap",
    "overlap",
    "stability_curve",
    "steering",
    "token_shift",
    "verdict",
    "write_report",
]
