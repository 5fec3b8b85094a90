"""Decoding with contrast."""

from dps_lens.steering.generate import Generation, generate

__all__ = ["Generation", "generate"]
