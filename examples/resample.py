"""Resample ablation: the z of another example, drawn at random, at the same relative positions."""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

import dps_lens as dps


@dataclass(frozen=True)
class Resample(dps.Ablation):
    """z := z of another discovery example in the same condition, read at the same share of the way through.

    Attributes:
        seed: of the draws; an example draws the same other one in all conditions.
    """

    name: ClassVar[str] = "resample"
    seed: int = 0

    def values_for(self, prompt: dps.Prompt, context: dps.Context) -> torch.Tensor:
        start, stop = prompt.spans["profile" if context.positions == "profile" else "response"]
        n = stop - 1 if context.positions == "all" else stop - start
        own = (prompt.user_id, prompt.example_id)
        others = [one for one in context.examples if (one.user_id, one.id) != own]
        if not others:
            raise dps.DPSLensError("resample: there is no other discovery example to take z from")
        other = random.Random(f"{self.seed}|{own}").choice(others)
        z = context.z(context.build(other))
        return z[:, torch.arange(n) * z.shape[1] // n]
