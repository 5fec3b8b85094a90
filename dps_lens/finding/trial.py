"""The runs that finders of sets measure on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from dps_lens.errors import ScoreError
from dps_lens.literals import Quantity
from dps_lens.scoring.answers import ExampleRun
from dps_lens.scoring.paths import STEPS, integrated


@dataclass(frozen=True, eq=False)
class Trial:
    """The clean runs of one discovery example that finders measure on; made once, every prompt cached.

    Attributes:
        user_id: whose example.
        necessity: own-profile runs, one per counterfactual, to be patched with its z: losing these heads (noising).
        sufficiency: counterfactual runs, to be patched with the own run's z: bringing these heads (denoising).
        task: the same task without a profile, heads zeroed.
        neutral: neutral text, heads zeroed; None where it is not asked for.
        shares: what each counterfactual weighs in `necessity` and `sufficiency`, adding up to 1; by default all the
            same.
        steps: nodes of the path integrals.
        paths: `Float[Tensor, "layer head"]` by quantity, integrated scores that were made before.
        memo: what sets were measured to do, by quantity and mask.
    """

    user_id: str
    necessity: tuple[ExampleRun, ...]
    sufficiency: tuple[ExampleRun, ...]
    task: ExampleRun
    neutral: ExampleRun | None
    shares: tuple[float, ...] = ()
    steps: int = STEPS
    paths: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    memo: dict[tuple[Quantity, bytes], float] = field(default_factory=dict, repr=False)

    def runs(self, quantity: Quantity) -> tuple[ExampleRun, ...]:
        """The runs whose mean a quantity is.

        Raises:
            ScoreError: there is no neutral text.
        """
        if quantity in ("necessity", "sufficiency"):
            return self.necessity if quantity == "necessity" else self.sufficiency
        if quantity == "task_cost":
            return (self.task,)
        if self.neutral is None:
            raise ScoreError("neutral_cost: these trials hold no neutral text; give FindConfig(neutral=…) some")
        return (self.neutral,)

    def weights(self, quantity: Quantity) -> tuple[float, ...]:
        """What each of the runs of a quantity weighs in it, adding up to 1."""
        runs = self.runs(quantity)
        return self.shares if self.shares and quantity in ("necessity", "sufficiency") else (1 / len(runs),) * len(runs)

    def path(self, quantity: Quantity) -> Tensor:
        """Integrated scores `[layer head]` of a quantity: kept ones, else made now."""
        kept = self.paths.get(quantity)
        if kept is not None:
            return kept
        paths = torch.stack([integrated(run, self.steps).values for run in self.runs(quantity)])
        return _sign(quantity) * torch.tensordot(torch.tensor(self.weights(quantity)), paths, 1)

    def measured(self, quantity: Quantity, masks: Bool[Tensor, "row layer head"]) -> Float64[Tensor, " row"]:
        """What the sets of these rows do, each set measured once.

        `necessity`: the patched objective minus that of the own run. `sufficiency`: the counterfactual objective minus
        the patched one. The costs: NLL with the heads zeroed minus the clean one, nats per token.
        """
        keys: list[tuple[Quantity, bytes]] = [(quantity, mask.numpy().tobytes()) for mask in masks]
        missing = {key: mask for key, mask in zip(keys, masks, strict=True) if key not in self.memo}
        if missing:
            rows = torch.stack(list(missing.values()))
            each = zip(self.weights(quantity), self.runs(quantity), strict=True)
            changes = torch.stack([weight * (run.ablated(rows) - run.value) for weight, run in each]).sum(0)
            self.memo.update(zip(missing, (_sign(quantity) * changes).tolist(), strict=True))
        return torch.tensor([self.memo[key] for key in keys], dtype=torch.float64)


def _sign(quantity: Quantity) -> int:
    # What patching in brings lowers the NLL.
    return -1 if quantity == "sufficiency" else 1
