"""Families × users → sets of heads: rankings, folds, exclusions, random sets, held-out checks, inherited settings."""

from dps_lens.selection.controls import draw_seed, random_beside, random_heads, random_rankings, random_sets
from dps_lens.selection.rankings import HeadSource, Rankings, check_held_out, folds, rankings, undefined_of
from dps_lens.selection.settings import SHARED, Settings, inherited, score_settings

__all__ = [
    "SHARED",
    "HeadSource",
    "Rankings",
    "Settings",
    "check_held_out",
    "draw_seed",
    "folds",
    "inherited",
    "random_beside",
    "random_heads",
    "random_rankings",
    "random_sets",
    "rankings",
    "score_settings",
    "undefined_of",
]
