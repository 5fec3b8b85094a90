"""How the logits of a request's branches become the one distribution that it is written from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.steering.decoder import Row
from dps_lens.steering.rules import Rule
from dps_lens.steering.terms import Branch, combine, farthest_early, kl_divergence

MOST = 1024
"""Nats that `target_kl` may move a token by."""

_ROUNDING = 1e-5


@dataclass
class Mixer:
    """A rule with each request's strengths.

    Where the branches of a request stand in the batch, and its strengths, are laid out once on the device, and
    again when rows leave, so that a step moves nothing between host and device.

    Attributes:
        rule: what is contrasted.
        gammas: strength of the heads or vectors, one a request.
        alphas: strength of the prompt, or of the heads where a vector has γ, one a request.
        max_gamma: cap of an adaptive strength.
        min_p: share of the largest probability under which tokens are ruled out.
        max_kl: cap on KL(steered ‖ full), nats.
        target_kl: what KL(steered ‖ full) is made, nats.
    """

    rule: Rule
    gammas: Sequence[float]
    alphas: Sequence[float]
    max_gamma: float | None = None
    min_p: float | None = None
    max_kl: float | None = None
    target_kl: float | None = None

    def lay_out(self, rows: Sequence[Row], running: Sequence[int], device: torch.device) -> None:
        """Note where the branches of the requests that run stand among the rows of the batch."""
        place = {(row.request, row.branch): index for index, row in enumerate(rows)}
        branches: tuple[Branch, ...] = ("full", *(term.branch for term in self.rule.terms if term.branch != "early"))
        self._rows, self._present = {}, {}
        for branch in branches:
            # The row of a negative prompt may be there for a patch alone.
            idle = {request for request in running if branch == "negative" and not self.alphas[request]}
            at = torch.tensor([-1 if one in idle else place.get((one, branch), -1) for one in running])
            self._rows[branch] = at.clamp(min=0).to(device)
            self._present[branch] = (at >= 0)[:, None].to(device)

        def each(values: Sequence[float]) -> Float[Tensor, "request 1"]:
            return torch.tensor([float(values[request]) for request in running], device=device)[:, None]

        cap = torch.inf if self.max_gamma is None else self.max_gamma
        self._given = self.rule.given(each(self.gammas), each(self.alphas), cap)
        if self.rule.has("early"):
            self._present["early"] = torch.ones(1, 1, dtype=torch.bool, device=device)

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], early: Float[Tensor, "layer row d_vocab"]
    ) -> tuple[Float[Tensor, "request d_vocab"], Float[Tensor, "request d_vocab"]]:
        """Full logits of each request, NaN where the full model does not run, and steered ones."""
        of = {
            branch: torch.where(self._present[branch], logits[rows], torch.nan) for branch, rows in self._rows.items()
        }
        full = of.pop("full")
        # Where the full model does not run, the changed one, or the masked one alone, is what is steered.
        changed = self.rule.in_place or self.rule.ablating
        base, rows = full, self._rows["full"]
        if changed is not None:
            base = torch.where(self._present["full"], full, of[changed.branch])
            rows = torch.where(self._present["full"][:, 0], rows, self._rows[changed.branch])
        if self.rule.has("early"):
            of["early"] = farthest_early(base, early[:, rows])
        steered = combine(self.rule.terms, base, of, self._given, self._present)
        if (share := max(self.min_p or 0.0, self.rule.min_p or 0.0)) > 0:
            steered = with_min_p(steered, base, share)
        if self.target_kl is not None:
            return full, at_kl(steered, full, self.target_kl)
        return full, steered if self.max_kl is None else within_kl(steered, full, self.max_kl)


def with_min_p(
    steered: Float[Tensor, "row d_vocab"], full: Float[Tensor, "row d_vocab"], share: float
) -> Float[Tensor, "row d_vocab"]:
    """Rule out tokens whose probability under the full model is below `share` of the largest (arXiv 2210.15097)."""
    return steered.masked_fill(full < full.amax(-1, keepdim=True) + torch.tensor(share).log().item(), -torch.inf)


def at_kl(
    steered: Float[Tensor, "row d_vocab"], full: Float[Tensor, "row d_vocab"], target: float
) -> Float[Tensor, "row d_vocab"]:
    """Steer each row exactly so hard that KL(steered ‖ full) is `target` nats.

    The row becomes `full + λ (steered − full)`, along which the divergence rises with λ, up to −log p of the token that
    gains most. Where that is less than the target, the token that gains most gains `MOST` nats. A row that is not
    steered, but for rounding, stays as it is.
    """
    change = steered - full
    size = change.abs().amax(-1, keepdim=True)
    change = torch.where(size > _ROUNDING * full.abs().amax(-1, keepdim=True), change / size, 0.0)
    low, high = torch.zeros(len(full), 1, device=full.device), torch.ones(len(full), 1, device=full.device)
    for _ in range(MOST.bit_length() - 1):
        short = (kl_divergence(full + high * change, full) < target)[:, None]
        low, high = torch.where(short, high, low), torch.where(short, 2 * high, high)
    for _ in range(24):
        middle = (low + high) / 2
        short = (kl_divergence(full + middle * change, full) < target)[:, None]
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return full + high * change


def within_kl(
    steered: Float[Tensor, "row d_vocab"], full: Float[Tensor, "row d_vocab"], limit: float
) -> Float[Tensor, "row d_vocab"]:
    """Draw each row back to the full model until KL(steered ‖ full) is at most `limit` nats.

    The row becomes `full + λ (steered − full)`, along which the divergence rises with λ; λ by bisection to
    2⁻²⁴.
    """
    change = steered - full
    low, high = torch.zeros(len(full), 1, device=full.device), torch.ones(len(full), 1, device=full.device)
    over = kl_divergence(steered, full) > limit
    # A GPU would have to be waited for.
    if over.device.type == "cpu" and not bool(over.any()):
        return steered
    for _ in range(24):
        middle = (low + high) / 2
        fits = (kl_divergence(full + middle * change, full) <= limit)[:, None]
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(over[:, None], full + low * change, steered)
