"""Decoding that contrasts the model with itself, and vectors that steer it."""

from dps_lens.steering.generate import generate
from dps_lens.steering.generation import Generation, TextStream
from dps_lens.steering.steerx import steerx_vector
from dps_lens.steering.vector import SteeringVector, style_vector

__all__ = ["Generation", "SteeringVector", "TextStream", "generate", "steerx_vector", "style_vector"]
