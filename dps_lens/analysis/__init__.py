"""Validation of heads on held-out examples."""

from dps_lens.analysis.ablation import AblationCost, ablation_cost

__all__ = ["AblationCost", "ablation_cost"]
