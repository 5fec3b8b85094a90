"""Heads to compare with."""

from dps_lens.families.copying import Copying
from dps_lens.families.function_vector import FunctionVector, Task
from dps_lens.families.profile import ProfileRetrieval
from dps_lens.families.reference import KINDS, Family, reference_heads
from dps_lens.families.repeated import Repeated, attention_to
from dps_lens.families.retrieval import Needle, Retrieval, shipped_paragraphs
from dps_lens.families.style import StyleModulation

__all__ = [
    "KINDS",
    "Copying",
    "Family",
    "FunctionVector",
    "Needle",
    "ProfileRetrieval",
    "Repeated",
    "Retrieval",
    "StyleModulation",
    "Task",
    "attention_to",
    "reference_heads",
    "shipped_paragraphs",
]
