"""Heads to compare with."""

from dps_lens.families.random import random_heads

__all__ = ["random_heads"]
