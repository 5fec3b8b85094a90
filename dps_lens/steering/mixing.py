"""How the logits of a request's branches become the one distribution that it is written from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.steering.decoder import Branch, Kind
from dps_lens.steering.rules import Rule, capped, early_contrast, entropy, plausible


@dataclass
class Mixer:
    """A rule with each request's strengths.

    Where the branches of a request stand in the batch, and its strengths, are laid out once on the device, and
    again when rows leave, so that a step moves nothing between host and device.

    Attributes:
        rule: what is contrasted.
        gammas: strength of the heads, one a request.
        alphas: strength of the prompt, one a request.
        max_gamma: cap of an entropy γ.
        plausibility: share of the largest probability under which tokens are ruled out.
        max_shift: cap on KL(steered ‖ full), nats.
    """

    rule: Rule
    gammas: Sequence[float]
    alphas: Sequence[float]
    max_gamma: float | None = None
    plausibility: float | None = None
    max_shift: float | None = None

    def lay_out(self, branches: Sequence[Branch], running: Sequence[int], device: torch.device) -> None:
        """Note where the branches of the requests that run stand among the rows of the batch."""
        place = {(branch.request, branch.kind): row for row, branch in enumerate(branches)}

        def rows_of(kind: Kind) -> tuple[Tensor, Tensor]:
            rows = torch.tensor([place.get((request, kind), -1) for request in running])
            return rows.clamp(min=0).to(device), (rows >= 0)[:, None].to(device)

        def each(values: Sequence[float]) -> Float[Tensor, "request 1"]:
            return torch.tensor([float(values[request]) for request in running], device=device)[:, None]

        self._rows = {kind: rows_of(kind) for kind in ("full", "edited", "without")}
        self._gamma, self._alpha = each(self.gammas), each(self.alphas)

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], early: Float[Tensor, "layer row d_vocab"]
    ) -> tuple[Float[Tensor, "request d_vocab"], Float[Tensor, "request d_vocab"]]:
        """Full logits of each request, NaN where the full model does not run, and steered ones."""
        full, edited = self._of("full", logits), self._of("edited", logits)
        # Where the full model does not run, the edited one is what is steered.
        base = torch.where(self._rows["full"][1], full, edited)
        steered = base
        if self.rule.heads:
            strength = self._gamma
            if self.rule.adaptive:
                strength = entropy(base)[:, None]
                strength = strength if self.max_gamma is None else strength.clamp(max=self.max_gamma)
            steered = steered + self._term("edited", strength, base, edited)
        if self.rule.prompt:
            steered = steered + self._term("without", self._alpha, base, self._of("without", logits))
        if self.rule.early:
            steered = early_contrast(full, early)
        if self.plausibility is not None:
            steered = plausible(steered, base, self.plausibility)
        return full, steered if self.max_shift is None else capped(steered, full, self.max_shift)

    def _of(self, kind: Kind, logits: Tensor) -> Float[Tensor, "request d_vocab"]:
        rows, there = self._rows[kind]
        return torch.where(there, logits[rows], torch.nan)

    def _term(self, kind: Kind, strength: Tensor, base: Tensor, other: Tensor) -> Float[Tensor, "request d_vocab"]:
        return torch.where(self._rows[kind][1], strength * (base - other), 0.0)
