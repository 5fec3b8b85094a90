"""Statistics of scores: intervals, overlap, reliability, significance, groups of users. No model is run."""

from dps_lens.stats.bootstrap import bootstrap_t_ci
from dps_lens.stats.groups import UserClusters, cluster_users
from dps_lens.stats.overlap import Overlap, overlap
from dps_lens.stats.reliability import split_half, stability
from dps_lens.stats.screening import screening_recall
from dps_lens.stats.significance import Significance, significant_heads

__all__ = [
    "Overlap",
    "Significance",
    "UserClusters",
    "bootstrap_t_ci",
    "cluster_users",
    "overlap",
    "screening_recall",
    "significant_heads",
    "split_half",
    "stability",
]
