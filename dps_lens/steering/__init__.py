"""Decoding that contrasts the model with itself, or adds vectors to it."""

from dps_lens.steering.generate import generate
from dps_lens.steering.generation import Generation, TextStream
from dps_lens.steering.plan import DecodeConfig
from dps_lens.steering.rules import Rule
from dps_lens.steering.sampling import Sampling
from dps_lens.steering.terms import Term
from dps_lens.steering.vector import HeadVector, SteeringVector

__all__ = [
    "DecodeConfig",
    "Generation",
    "HeadVector",
    "Rule",
    "Sampling",
    "SteeringVector",
    "Term",
    "TextStream",
    "generate",
]
