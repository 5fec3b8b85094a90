"""Decoding that contrasts the model with itself."""

from dps_lens.steering.generate import generate
from dps_lens.steering.generation import Generation, TextStream

__all__ = ["Generation", "TextStream", "generate"]
