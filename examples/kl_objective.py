"""How far an ablation moves what the model would say, whatever the user wrote."""

from typing import ClassVar

import torch

import dps_lens as dps


class KL(dps.Objective):
    """KL(ablated ‖ full) at each position of the response; 0 for the full model itself."""

    name: ClassVar[str] = "kl"

    def losses(self, logits: torch.Tensor, targets: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        ablated, full = logits.float().log_softmax(-1), clean.float().log_softmax(-1)
        return (ablated.exp() * (ablated - full)).sum(-1)
