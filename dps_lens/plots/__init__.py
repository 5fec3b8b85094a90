"""Figures: plotly, returned, never shown."""

from dps_lens.plots.ablation import ablation
from dps_lens.plots.attention import attention, attention_html
from dps_lens.plots.dossier import dossier, token_effects
from dps_lens.plots.evaluation import evaluation
from dps_lens.plots.export import browser, export
from dps_lens.plots.faithfulness import faithfulness
from dps_lens.plots.families import families
from dps_lens.plots.head_vectors import head_vectors
from dps_lens.plots.heatmap import heatmap, heatmaps
from dps_lens.plots.overlap import overlap
from dps_lens.plots.pareto import k_sweep, pareto
from dps_lens.plots.paths import paths
from dps_lens.plots.points import points
from dps_lens.plots.stability import stability_curve
from dps_lens.plots.steering import steering
from dps_lens.plots.theme import TEMPLATE
from dps_lens.plots.token_shift import token_shift

__all__ = [
    "TEMPLATE",
    "ablation",
    "attention",
    "attention_html",
    "browser",
    "dossier",
    "evaluation",
    "export",
    "faithfulness",
    "families",
    "head_vectors",
    "heatmap",
    "heatmaps",
    "k_sweep",
    "overlap",
    "pareto",
    "paths",
    "points",
    "stability_curve",
    "steering",
    "token_effects",
    "token_shift",
]
