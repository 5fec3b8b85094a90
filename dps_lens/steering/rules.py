"""Rules of contrastive decoding: how the logits of several branches become one distribution.

Every rule adds `strength · (full − other)` to the logits of the full model, one term a branch. Logits
and log-probabilities differ by a constant a row, so that both give the same distribution.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.errors import SteeringError

RELATIVE_TOP = 0.1


@dataclass(frozen=True)
class Rule:
    """What is contrasted.

    Attributes:
        heads: with the model without its heads, strength γ.
        prompt: with the prompt without its profile, strength α.
        early: with an early layer of the full model.
        amplify: no contrast; the heads' z is scaled by 1 + γ.
        vector: no contrast; γ times a steering vector is added.
        adaptive: γ is the entropy of the full distribution, at every step anew.
        uniform: the heads' attention is spread evenly instead of z set to zero.
    """

    heads: bool = False
    prompt: bool = False
    early: bool = False
    amplify: bool = False
    vector: bool = False
    adaptive: bool = False
    uniform: bool = False

    @property
    def needs_heads(self) -> bool:
        return self.heads or self.amplify

    @property
    def edits(self) -> bool:
        """A branch is edited, with strength γ."""
        return self.needs_heads or self.vector

    @property
    def alone(self) -> bool:
        """The edited branch is what is written from; the full model does not run."""
        return self.amplify or self.vector


RULES = {
    "dps": Rule(heads=True),
    "dps-entropy": Rule(heads=True, adaptive=True),
    "decore": Rule(heads=True, adaptive=True, uniform=True),
    "cad": Rule(prompt=True),
    "cos": Rule(prompt=True),
    "dola": Rule(early=True),
    "amplify": Rule(amplify=True),
    "vector": Rule(vector=True),
}


def find_rule(name: str) -> Rule:
    """A rule by name, or two stacked: one that edits and one that contrasts prompts, `"dps+cad"`.

    Raises:
        SteeringError: a rule is unknown, or the two do not stack.
    """
    parts = name.split("+")
    for part in parts:
        if part not in RULES:
            raise SteeringError(f"generate: rule {part!r} is unknown; use one of {', '.join(RULES)}, or 'dps+cad'")
    rules = [RULES[part] for part in parts]
    if len(rules) == 1:
        return rules[0]
    edits, prompts = ([rule for rule in rules if kind(rule)] for kind in (lambda r: r.edits, lambda r: r.prompt))
    if len(rules) != 2 or len(edits) != 1 or len(prompts) != 1:
        raise SteeringError(f"generate: {name!r} does not stack; give one rule of heads and one of prompts, 'dps+cad'")
    return replace(edits[0], prompt=True)


def check_strength(name: str, value: float) -> None:
    """Refuse a γ below −1 (the masked model), an α below 0, and what is not a number.

    Raises:
        SteeringError: names the value.
    """
    least = {"gamma": -1, "alpha": 0}[name]
    if not least <= value < math.inf:
        raise SteeringError(f"{name} {value} is not a number from {least} up")


def entropy(logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """Entropy of each row's distribution, nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def plausible(
    steered: Float[Tensor, "row d_vocab"], full: Float[Tensor, "row d_vocab"], share: float
) -> Float[Tensor, "row d_vocab"]:
    """Rule out tokens whose probability under the full model is below `share` of the largest (arXiv 2210.15097)."""
    return steered.masked_fill(full < full.amax(-1, keepdim=True) + torch.tensor(share).log().item(), -torch.inf)


def early_contrast(
    full: Float[Tensor, "row d_vocab"], early: Float[Tensor, "layer row d_vocab"]
) -> Float[Tensor, "row d_vocab"]:
    """DoLa (arXiv 2309.03883): `log p − log p_j` of the layer j whose distribution is farthest from the full one.

    Tokens below 0.1 of the largest probability are ruled out.
    """
    return plausible(full.log_softmax(-1) - premature(full, early), full, RELATIVE_TOP)


def premature(
    full: Float[Tensor, "row d_vocab"], early: Float[Tensor, "layer row d_vocab"]
) -> Float[Tensor, "row d_vocab"]:
    """Log-probabilities of the layer, row by row, that is farthest from the full model by Jensen–Shannon divergence."""
    ours, theirs = full.log_softmax(-1), early.log_softmax(-1)
    # In logs: a probability that underflows in both would make 0 · ∞.
    middle = torch.logaddexp(ours, theirs) - math.log(2)
    divergence = sum((p.exp() * (p - middle)).sum(-1) for p in (ours, theirs)) / 2
    return theirs[divergence.argmax(0), torch.arange(len(full), device=full.device)]  # type: ignore[union-attr]


def divergence(steered: Float[Tensor, "row d_vocab"], full: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """KL(steered ‖ full) of each row, nats."""
    p, q = steered.log_softmax(-1), full.log_softmax(-1)
    return torch.where(p > -torch.inf, p.exp() * (p - q), 0).sum(-1)


def capped(
    steered: Float[Tensor, "row d_vocab"], full: Float[Tensor, "row d_vocab"], limit: float
) -> Float[Tensor, "row d_vocab"]:
    """Draw each row back to the full model until KL(steered ‖ full) is at most `limit` nats.

    The row becomes `full + λ (steered − full)`, along which the divergence rises with λ; λ by bisection to
    2⁻²⁴.
    """
    change = steered - full
    low, high = torch.zeros(len(full), 1, device=full.device), torch.ones(len(full), 1, device=full.device)
    over = divergence(steered, full) > limit
    if not bool(over.any()):
        return steered
    for _ in range(24):
        middle = (low + high) / 2
        fits = (divergence(full + middle * change, full) <= limit)[:, None]
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(over[:, None], full + low * change, steered)
