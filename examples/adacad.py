"""AdaCAD (arXiv 2409.07394): the more the profile changes the next token, the harder it is contrasted."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

import dps_lens as dps


@dataclass(frozen=True)
class AdaCAD(dps.Term):
    """(1 + α) · full − α · negative; α is the Jensen–Shannon divergence of the two distributions, in nats."""

    adaptive: ClassVar[bool] = True
    branch: Literal["negative"] = "negative"

    def strength(self, given: float | torch.Tensor, base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        p, q = base.log_softmax(-1), other.log_softmax(-1)
        middle = torch.logaddexp(p, q) - math.log(2)
        alpha = ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2
        return alpha[:, None].clamp(max=given)
