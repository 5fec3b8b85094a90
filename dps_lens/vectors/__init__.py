"""Vectors of a user: directions in the residual stream, what heads add, and the mean output of heads."""

from dps_lens.vectors.heads import head_vectors
from dps_lens.vectors.preference import preference_vector
from dps_lens.vectors.result import HeadVectors
from dps_lens.vectors.steerx import steerx_vector
from dps_lens.vectors.style import style_vector

__all__ = ["HeadVectors", "head_vectors", "preference_vector", "steerx_vector", "style_vector"]
