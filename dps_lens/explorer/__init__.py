"""Look at a run: heads, overlap, ablation and steered text in one page, offline or with a live model."""

from dps_lens.explorer.content import explore
from dps_lens.explorer.page import ExampleView, Exploration

__all__ = ["ExampleView", "Exploration", "explore"]
