"""Look at a run: heads, overlap, ablation and steered text in one page, offline or with a live model."""

from dps_lens.explorer.content import ExampleView, Exploration, explore

__all__ = ["ExampleView", "Exploration", "explore"]
