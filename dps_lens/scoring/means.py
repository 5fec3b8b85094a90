"""The mean z of every head, for mean ablation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dps_lens.data import Example, PromptConfig, User
from dps_lens.data.conditions import prompts_in
from dps_lens.intervene import record_z
from dps_lens.literals import Positions
from dps_lens.model import HookedModel
from dps_lens.work import Run, Work


@dataclass
class MeanWork(Work):
    """Sums of z over the edited positions of prompts, a unit a user."""

    model: HookedModel
    users: Sequence[User]
    examples: Sequence[Example]
    conditions: tuple[str, ...]
    positions: Positions
    prompt_config: PromptConfig
    n_donors: int
    seed: int

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """`sum.…` and `count.…` by condition, of one user."""
        made: dict[str, Tensor] = {}
        options = {"n_donors": self.n_donors, "seed": self.seed, "config": self.prompt_config}
        for example in (one for one in self.examples if one.user_id == key):
            for name in self.conditions:
                for prompt in prompts_in(self.model, example, name, self.users, **options):  # type: ignore[arg-type]
                    start, stop = prompt.spans["profile"]
                    if self.positions == "profile" and stop <= start:
                        continue
                    z = record_z(self.model, prompt, positions=self.positions).double()
                    made[f"sum.{name}"] = made.get(f"sum.{name}", torch.zeros(())) + z.sum(1)
                    made[f"count.{name}"] = made.get(f"count.{name}", torch.tensor(0)) + z.shape[1]
        return made

    def means(self, run: Run) -> dict[str, Tensor]:
        """`[layer head d_head]` by condition; of a condition without such positions, zeros, which are put nowhere."""
        users = list(dict.fromkeys(example.user_id for example in self.examples))
        made = run.units(self, users, "mean of z", unit="user", split=False, keep=False)
        means: dict[str, Tensor] = {}
        for name in self.conditions:
            own = [unit for unit in made.made.values() if f"sum.{name}" in unit]
            if own:
                count = sum(int(unit[f"count.{name}"]) for unit in own)
                means[name] = (torch.stack([unit[f"sum.{name}"] for unit in own]).sum(0) / count).float()
        nothing = torch.zeros_like(next(iter(means.values())))
        return {name: means.get(name, nothing) for name in self.conditions}
