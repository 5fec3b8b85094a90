"""Scores of heads: clean runs, what ablations change, and how that becomes a score."""

from dps_lens.scoring.clean_run import CleanRun, single_heads
from dps_lens.scoring.objectives import NLL, Objective
from dps_lens.scoring.pcs import score_heads
from dps_lens.scoring.sweep import ScoreConfig

__all__ = ["NLL", "CleanRun", "Objective", "ScoreConfig", "score_heads", "single_heads"]
