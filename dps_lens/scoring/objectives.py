"""What a score is a change of."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dps_lens.extensions import settings_of
from dps_lens.model.losses import token_losses


class Objective(ABC):
    """One number a response position; a head's score is what its ablation adds to their mean.

    Subclass it, give a `name` and `losses`, and pass an object wherever `objective=` is taken.

    Attributes:
        name: as it stands in manifests.
        unit: of a score.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "nats per token"

    def settings(self) -> Any:
        """The name, with the fields where there are any, for a manifest."""
        return settings_of(self.name, self)

    @abstractmethod
    def losses(
        self,
        logits: Float[Tensor, "pos d_vocab"],
        targets: Int[Tensor, " pos"],
        clean: Float[Tensor, "pos d_vocab"],
    ) -> Float[Tensor, " pos"]:
        """One number a position; gradients flow through it where scores are estimated.

        Args:
            logits: under the ablation, or of the clean run itself.
            targets: the response's tokens.
            clean: logits of the clean run.
        """


class NLL(Objective):
    """−log p of the response's tokens."""

    name: ClassVar[str] = "nll"

    def losses(
        self,
        logits: Float[Tensor, "pos d_vocab"],
        targets: Int[Tensor, " pos"],
        clean: Float[Tensor, "pos d_vocab"],
    ) -> Float[Tensor, " pos"]:
        return token_losses(logits, targets)


def losses_of_rows(
    objective: Objective,
    logits: Float[Tensor, "row pos d_vocab"],
    targets: Int[Tensor, " pos"],
    clean: Float[Tensor, "pos d_vocab"],
) -> Float64[Tensor, "row pos"]:
    """An objective row by row: over a large vocabulary the temporaries of a whole batch would be fresh memory."""
    return torch.stack([objective.losses(row, targets, clean) for row in logits]).cpu().double()
