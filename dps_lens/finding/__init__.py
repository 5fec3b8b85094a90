"""Sets of heads that carry a user's preferences, under bounds on what their removal costs elsewhere."""

from dps_lens.finding.causal_gates import CausalGates, GatingConfig, causal_head_gates
from dps_lens.finding.conditional import Conditional
from dps_lens.finding.find import find_heads
from dps_lens.finding.finder import Bounds, Finder, Fit
from dps_lens.finding.finders import FINDERS, find_finder
from dps_lens.finding.gates import Gates
from dps_lens.finding.greedy import Greedy
from dps_lens.finding.rank import Rank
from dps_lens.finding.trial import Trial
from dps_lens.finding.work import FindConfig

__all__ = [
    "FINDERS",
    "Bounds",
    "CausalGates",
    "Conditional",
    "FindConfig",
    "Finder",
    "Fit",
    "Gates",
    "GatingConfig",
    "Greedy",
    "Rank",
    "Trial",
    "causal_head_gates",
    "find_finder",
    "find_heads",
]
