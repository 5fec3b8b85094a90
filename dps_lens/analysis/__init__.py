"""Validation of heads: held-out ablation, reliability, significance."""

from dps_lens.analysis.ablation import AblationCost, ablation_cost
from dps_lens.analysis.held_out import held_out_effects, measure_noise
from dps_lens.analysis.reliability import split_half, stability
from dps_lens.analysis.significance import Significance, significant_heads

__all__ = [
    "AblationCost",
    "Significance",
    "ablation_cost",
    "held_out_effects",
    "measure_noise",
    "significant_heads",
    "split_half",
    "stability",
]
