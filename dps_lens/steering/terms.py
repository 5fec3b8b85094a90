"""Terms of contrastive decoding: how the logits of several branches become one distribution.

A rule is a tuple of terms. Each looks at one branch beside the model that is steered and moves the logits, by default
by `strength · (base − other)`. Logits and log-probabilities differ by a constant a row, so that both give the same
distribution. `combine` is the one place where this is computed: for `generate`, for the likelihood of a text, and for
the logits processor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dps_lens.intervene import AblationLike

Branch: TypeAlias = Literal["full", "ablated", "scaled", "shifted", "heads_shifted", "negative", "early"]
"""What runs beside the full model: it without heads, with heads' z multiplied, with a vector added to the residual
stream or to heads' z, with the negative prompt; or log-probabilities read off one of its early layers."""

Strength: TypeAlias = float | Float[Tensor, "row 1"]


@dataclass(frozen=True)
class Term:
    """`steered + strength · (base − other)`; subclass it for a rule of your own.

    Attributes:
        branch: which logits are `other`. Strengths are γ for edited branches, α for negative prompts, and for heads
            where a vector has γ.
        ablation: of the branch `"ablated"`, where the rule asks for one.
        adaptive: the term finds its strength at every step; what is given is its cap.
    """

    branch: Branch = "ablated"
    ablation: AblationLike | None = None
    adaptive: ClassVar[bool] = False

    def strength(
        self, given: Strength, base: Float[Tensor, "row d_vocab"], other: Float[Tensor, "row d_vocab"]
    ) -> Strength:
        """How hard each row is steered."""
        return given

    def combine(
        self,
        steered: Float[Tensor, "row d_vocab"],
        base: Float[Tensor, "row d_vocab"],
        other: Float[Tensor, "row d_vocab"],
        strength: Strength,
    ) -> Float[Tensor, "row d_vocab"]:
        """The logits after this term."""
        return steered + strength * (base - other)


@dataclass(frozen=True)
class EntropyTerm(Term):
    """The strength is the entropy of the base distribution in nats, as in DeCoRe (arXiv 2410.18860)."""

    adaptive: ClassVar[bool] = True

    def strength(
        self, given: Strength, base: Float[Tensor, "row d_vocab"], other: Float[Tensor, "row d_vocab"]
    ) -> Strength:
        return entropy(base)[:, None].clamp(max=given)


@dataclass(frozen=True)
class DivergenceTerm(Term):
    """The strength is the Jensen–Shannon divergence of the two distributions in nats, as in AdaCAD (arXiv 2409.07394)
    and the code published with it: hard where they disagree, at most log 2."""

    adaptive: ClassVar[bool] = True

    def strength(
        self, given: Strength, base: Float[Tensor, "row d_vocab"], other: Float[Tensor, "row d_vocab"]
    ) -> Strength:
        return js_divergence(base, other)[:, None].clamp(max=given)


@dataclass(frozen=True)
class InPlaceTerm(Term):
    """No contrast: the branch, whose strength acts inside the model, is what is written from."""

    def combine(
        self,
        steered: Float[Tensor, "row d_vocab"],
        base: Float[Tensor, "row d_vocab"],
        other: Float[Tensor, "row d_vocab"],
        strength: Strength,
    ) -> Float[Tensor, "row d_vocab"]:
        return steered


@dataclass(frozen=True)
class EarlyTerm(Term):
    """DoLa (arXiv 2309.03883): `log p − strength · log p_j`, p_j read off the early layer that is farthest away."""

    branch: Branch = "early"

    def combine(
        self,
        steered: Float[Tensor, "row d_vocab"],
        base: Float[Tensor, "row d_vocab"],
        other: Float[Tensor, "row d_vocab"],
        strength: Strength,
    ) -> Float[Tensor, "row d_vocab"]:
        return base.log_softmax(-1) - strength * other


def combine(
    terms: Sequence[Term],
    base: Float[Tensor, "row d_vocab"],
    others: Mapping[Branch, Float[Tensor, "row d_vocab"]],
    given: Mapping[Branch, Strength],
    present: Mapping[Branch, Bool[Tensor, "row 1"]] | None = None,
) -> Float[Tensor, "row d_vocab"]:
    """Steered logits.

    Args:
        terms: of the rule.
        base: what is steered: the full model, or the edited one where the full model does not run.
        others: logits of the other branches; terms of missing ones do nothing.
        given: γ, α, or the cap of an adaptive strength, by branch.
        present: rows that have a branch; all of them by default.
    """
    steered = base
    for term in terms:
        if (other := others.get(term.branch)) is None:
            continue
        moved = term.combine(steered, base, other, term.strength(given[term.branch], base, other))
        steered = moved if present is None else torch.where(present[term.branch], moved, steered)
    return steered


def entropy(logits: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """Entropy of each row's distribution, nats."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def js_divergence(
    ours: Float[Tensor, "*rest d_vocab"], theirs: Float[Tensor, "*rest d_vocab"]
) -> Float[Tensor, "*rest"]:
    """Jensen–Shannon divergence of two distributions given as logits, nats."""
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    # In logs: a probability that underflows in both would make 0 · ∞.
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2


def kl_divergence(steered: Float[Tensor, "row d_vocab"], full: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """KL(steered ‖ full) of each row, nats."""
    p, q = steered.log_softmax(-1), full.log_softmax(-1)
    return torch.where(p == -torch.inf, 0, p.exp() * (p - q)).sum(-1)


def farthest_early(
    full: Float[Tensor, "row d_vocab"], early: Float[Tensor, "layer row d_vocab"]
) -> Float[Tensor, "row d_vocab"]:
    """Log-probabilities of the layer, row by row, that is farthest from the full model by Jensen–Shannon divergence."""
    farthest = js_divergence(full.expand_as(early), early).argmax(0)
    return early.log_softmax(-1)[farthest, torch.arange(len(full), device=full.device)]
