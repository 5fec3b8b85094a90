"""One switch for all fast paths, to find out whether one of them is to blame.

With `DPS_LENS_FAST=0` in the environment, attention is the hooked one, every component of the bridge runs, prompts are
copied for each row, and caches are those of Hugging Face. Results are the same up to rounding.
"""

import os


def is_fast() -> bool:
    """Whether the fast paths run; asked anew at every use."""
    return os.environ.get("DPS_LENS_FAST", "1") != "0"
