"""Sets of heads that carry a user's preferences, under bounds on what their removal costs elsewhere."""

from dps_lens.finding.finder import Bounds, Finder, Fit
from dps_lens.finding.trial import Trial

__all__ = ["Bounds", "Finder", "Fit", "Trial"]
