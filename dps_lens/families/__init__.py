"""Heads to compare with."""

from dps_lens.families.function_vector import FunctionVector, Task
from dps_lens.families.random import draw_seed, random_heads
from dps_lens.families.reference import KINDS, Family, reference_heads
from dps_lens.families.repeated import Repeated
from dps_lens.families.retrieval import Needle, Retrieval, shipped_paragraphs

__all__ = [
    "KINDS",
    "Family",
    "FunctionVector",
    "Needle",
    "Repeated",
    "Retrieval",
    "Task",
    "draw_seed",
    "random_heads",
    "reference_heads",
    "shipped_paragraphs",
]
