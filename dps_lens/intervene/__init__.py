"""Ablations of attention heads, on `hook_z`, as context managers.

One vocabulary for scoring, validation and steering: an `Ablation` says what stands in the place of a head's z,
its output before `W_O`, `blocks.{layer}.attn.hook_z`, shape `[batch pos head d_head]`. `Zero`, `Mean`, `Patch` and
`Uniform` have their names as shorthands; a subclass of your own is taken wherever a name is.
"""

from dps_lens.intervene.ablations import (
    ABLATIONS,
    Ablation,
    AblationLike,
    Context,
    Mean,
    Patch,
    Uniform,
    Zero,
    find_ablation,
)
from dps_lens.intervene.edits import Edit, Editing, Replacement, ablate, attention_for, row_masks
from dps_lens.intervene.gates import FromRow, Gate, Scale
from dps_lens.intervene.positions import Selection, Where, everywhere, window
from dps_lens.intervene.record import record_z, recording_z, response_z

__all__ = [
    "ABLATIONS",
    "Ablation",
    "AblationLike",
    "Context",
    "Edit",
    "Editing",
    "FromRow",
    "Gate",
    "Mean",
    "Patch",
    "Replacement",
    "Scale",
    "Selection",
    "Uniform",
    "Where",
    "Zero",
    "ablate",
    "attention_for",
    "everywhere",
    "find_ablation",
    "record_z",
    "recording_z",
    "response_z",
    "row_masks",
    "window",
]
