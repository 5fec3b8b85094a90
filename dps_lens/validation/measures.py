"""What is read off a run in which sets of heads were edited: sums of changes of NLL over conditions."""

from collections.abc import Mapping
from typing import NamedTuple


class Measure(NamedTuple):
    """A sum of changes of NLL over conditions, and the gain that it is a part of.

    Attributes:
        weights: condition → weight of its change under the edit.
        gain: condition → weight of its NLL in the full model; empty where no share is defined.
        left: count what is left of the gain instead of what is gone.
    """

    weights: Mapping[str, float]
    gain: Mapping[str, float]
    left: bool = False


GAIN = {"no_profile": 1.0, "own": -1.0}
GAIN_OTHER = {"other_user": 1.0, "own": -1.0}

# In the order of tables and figures: what is removed stands beside what it costs, and ablated beside patched.
MEASURES = {
    "gain_removed_other": Measure({"own": 1.0, "other_user": -1.0}, GAIN_OTHER),
    "gain_removed": Measure({"own": 1.0, "no_profile": -1.0}, GAIN),
    "task_cost": Measure({"no_profile": 1.0}, {}),
    "neutral_cost": Measure({"neutral": 1.0}, {}),
    "necessity_other": Measure({"noising_other": 1.0}, GAIN_OTHER),
    "sufficiency_other": Measure({"denoising_other": -1.0}, GAIN_OTHER),
    "necessity": Measure({"noising": 1.0}, GAIN),
    "sufficiency": Measure({"denoising": -1.0}, GAIN),
    "gain_left_other": Measure({"own": 1.0, "other_user": -1.0}, GAIN_OTHER, left=True),
    "gain_left": Measure({"own": 1.0, "no_profile": -1.0}, GAIN, left=True),
    "recovered": Measure({"vector": -1.0}, GAIN),
    "recovered_other": Measure({"vector_other": -1.0}, GAIN),
}

TASK_COST_IN_NLL = Measure({"task": 1.0}, {})
"""What an edit costs the task where the objective compares answers."""
