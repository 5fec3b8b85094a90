"""What sets of heads do on average over weighted trials, and whether they keep their bounds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dps_lens.finding.finder import Bounds
from dps_lens.finding.trial import Trial
from dps_lens.heads import Head, HeadSet
from dps_lens.literals import Quantity


@dataclass(frozen=True)
class Weighted:
    """The trials of one fit, with their weights.

    Attributes:
        trials: those that weigh something.
        weights: one a trial.
    """

    trials: Sequence[Trial]
    weights: Float[Tensor, " trial"]

    @classmethod
    def rows(cls, trials: Sequence[Trial], weights: Float[Tensor, "fit trial"]) -> "Iterator[Weighted]":
        """One for each fit."""
        for row in weights.double():
            used = row.nonzero().flatten().tolist()
            yield cls([trials[one] for one in used], row[used])

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads of the model."""
        cfg = self.trials[0].task.runner.cfg
        return cfg.n_layers, cfg.n_heads

    def path(self, quantity: Quantity) -> Float64[Tensor, "layer head"]:
        """Mean integrated score of every head."""
        paths = torch.stack([trial.path(quantity).double() for trial in self.trials])
        return torch.einsum("t,tlh->lh", self.weights, paths)

    def measured(self, quantity: Quantity, sets: Sequence[HeadSet]) -> Float64[Tensor, " set"]:
        """Mean of what each set does."""
        masks = torch.stack([self.mask(heads) for heads in sets])
        return self.weights @ torch.stack([trial.measured(quantity, masks) for trial in self.trials])

    def mask(self, heads: HeadSet) -> Bool[Tensor, "layer head"]:
        """The set as a mask over the model's heads."""
        return heads.mask(self.trials[0].task.runner.cfg)

    def keeps(self, sets: Sequence[HeadSet], bounds: Bounds) -> list[bool]:
        """Whether each set, measured as a whole, costs no more than its bounds."""
        kept = torch.ones(len(sets), dtype=torch.bool)
        for name, most in limits(bounds).items():
            rows = kept.nonzero().flatten().tolist()
            if rows:
                kept[rows] = self.measured(name, [sets[row] for row in rows]) <= most
        return kept.tolist()


def limits(bounds: Bounds) -> Mapping[Quantity, float]:
    """The bounds that are given, by what they bound."""
    given: dict[Quantity, float | None] = {"task_cost": bounds.task_cost, "neutral_cost": bounds.neutral_cost}
    return {name: most for name, most in given.items() if most is not None}


def best(values: Float[Tensor, "layer head"], k: int, *, positive: bool = False) -> HeadSet:
    """The k heads of largest value, best first, ties by layer, then head; `positive` leaves out all from 0 down."""
    order = torch.argsort(-values.flatten().double(), stable=True)[:k].tolist()
    heads = [Head(*divmod(index, values.shape[1])) for index in order]
    kept = [head for head in heads if not positive or values[head] > 0]
    return HeadSet(kept, shape=(values.shape[0], values.shape[1]))
