"""What a finder of head sets is asked for, and what it answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from dps_lens.extensions import settings_of
from dps_lens.finding.trial import Trial
from dps_lens.heads import HeadSet


@dataclass(frozen=True)
class Bounds:
    """What removing a set may cost where it should change nothing: nats per token, heads zeroed, mean over users.

    Attributes:
        task_cost: on the same task without a profile; None bounds nothing.
        neutral_cost: on neutral text.
    """

    task_cost: float | None = None
    neutral_cost: float | None = None


@dataclass(frozen=True)
class Fit:
    """The set that a finder found for one weighting of the trials.

    Attributes:
        heads: best first, at most k.
        values: `Float[Tensor, "layer head"]`, what the finder ranked by, for maps.
        roles: of heads, where the finder tells them apart: `"facilitating"`, `"interfering"`, `"irrelevant"`.
    """

    heads: HeadSet
    values: Tensor
    roles: dict[str, HeadSet] = field(default_factory=dict)


class Finder(ABC):
    """Finds the set of heads that carries what a counterfactual profile takes away.

    Subclasses are frozen dataclasses, so that their fields are in the manifest of what they found.

    Attributes:
        name: as it stands in manifests.
        n_bootstraps: resamples of users that are fitted where nobody asks for another number.
        together: fits of one call, and of one unit of a run; None makes all of them at once.
    """

    name: ClassVar[str]
    n_bootstraps: ClassVar[int] = 20
    together: ClassVar[int | None] = None

    @abstractmethod
    def fit(
        self, trials: Sequence[Trial], weights: Float[Tensor, "fit trial"], k: int, bounds: Bounds, seed: int
    ) -> list[Fit]:
        """One set for each row of weights.

        Args:
            trials: the runs of every discovery example.
            weights: of the trials, adding up to 1 in each row; users weigh equally, whoever is left out weighs nothing.
            k: at most so many heads.
            bounds: which the set as a whole must keep.
            seed: of whatever is drawn.
        """

    def settings(self) -> Any:
        """The name, with the fields where there are any, for a manifest."""
        return settings_of(self.name, self)
