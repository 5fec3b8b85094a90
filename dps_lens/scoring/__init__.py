"""Preference Contribution Scores."""

from dps_lens.scoring.attribution import attribute
from dps_lens.scoring.branches import Branches, response_nll, single_heads
from dps_lens.scoring.pcs import score_heads

__all__ = ["Branches", "attribute", "response_nll", "score_heads", "single_heads"]
