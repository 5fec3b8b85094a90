"""Validation of heads: held-out ablation and patching, overlap, reliability, significance, clusters of users."""

from dps_lens.analysis.ablation import AblationCost, ablation_cost
from dps_lens.analysis.attention import AttentionPattern, attention_pattern, profile_attention
from dps_lens.analysis.clusters import UserClusters, cluster_users
from dps_lens.analysis.curve import ablation_curve, patch_heads
from dps_lens.analysis.effects import SetEffects
from dps_lens.analysis.generation import AblatedTexts, ablated_generation
from dps_lens.analysis.held_out import held_out_effects, measure_noise
from dps_lens.analysis.overlap import Overlap, overlap
from dps_lens.analysis.reliability import split_half, stability
from dps_lens.analysis.screening import screening_recall
from dps_lens.analysis.significance import Significance, significant_heads
from dps_lens.analysis.steering import SteeringSweep, steering_sweep
from dps_lens.analysis.vectors import preference_vector, vector_recovery

__all__ = [
    "AblatedTexts",
    "AblationCost",
    "AttentionPattern",
    "Overlap",
    "SetEffects",
    "Significance",
    "SteeringSweep",
    "UserClusters",
    "ablated_generation",
    "ablation_cost",
    "ablation_curve",
    "attention_pattern",
    "cluster_users",
    "held_out_effects",
    "measure_noise",
    "overlap",
    "patch_heads",
    "preference_vector",
    "profile_attention",
    "screening_recall",
    "significant_heads",
    "split_half",
    "stability",
    "steering_sweep",
    "vector_recovery",
]
