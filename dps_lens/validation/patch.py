"""Necessity and sufficiency of the top K heads: activation patching on held-out examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dps_lens.data import Example, PromptConfig, User
from dps_lens.data.conditions import prompts_in
from dps_lens.errors import ScoreError
from dps_lens.intervene import Patch, Zero
from dps_lens.literals import AGAINST, Against, Select
from dps_lens.model import HookedModel
from dps_lens.scoring import ExampleRun
from dps_lens.scoring.sweep import patch_between
from dps_lens.selection import HeadSource
from dps_lens.validation.edits import Condition, EditWork
from dps_lens.validation.effects import SetEffects
from dps_lens.validation.work import HeldOutConfig
from dps_lens.work import Engine, Run, RunConfig


def patch_heads(
    model: HookedModel,
    users: Sequence[User],
    families: Mapping[str, HeadSource],
    *,
    against: Against = "no_profile",
    ks: Sequence[int] = (1, 2, 5, 10, 20),
    n_random: int = 20,
    select: Select | Mapping[str, Select] = "global",
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    held_out_config: HeldOutConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> SetEffects:
    """Necessity and sufficiency of the top K heads: noising and denoising patches on evaluation examples.

    Noising puts the z of the run without profile into the run with it; denoising the reverse. `ablation_curve` measures
    both against another user beside its ablations. Arguments as in `ablation_curve`.

    Args:
        against: the other run: without profile, or with another user's.

    Raises:
        ScoreError: as `ablation_curve`.
        PromptError: positions other than `"response"` and prompts of unequal length.
    """
    if against not in AGAINST:
        raise ScoreError(f"patch_heads: against {against!r} is unknown; use 'no_profile' or 'other_user'")
    if against == "other_user" and len(users) < 2:
        raise ScoreError("patch_heads: 'other_user' needs at least two users")
    run = Run(model, SetEffects, out, engine, run_config)
    work = PatchWork.of(
        "patch_heads",
        model,
        users,
        families,
        ks,
        ablation="patch",
        prompt_config=prompt_config,
        config=held_out_config,
        n_random=n_random,
        select=select,
        max_examples=max_examples,
        seed=seed,
        batch_size=run.config.batch_size,
        against=against,
    )
    return work.run(run)


@dataclass
class PatchWork(EditWork):
    """The run of `patch_heads`."""

    against: Against = "no_profile"

    def conditions(self, key: str, example: Example) -> dict[str, Condition]:
        own = self.build(example, "own")
        config, positions = self.settings.prompt_config, self.settings.positions
        (other,) = prompts_in(self.model, example, self.against, self.users, seed=self.seed, config=config)
        ends = (("own", own), (self.against, other))
        run_own, run_other = (
            self.clean_run(prompt, name, ablation=Zero(), keep_z=positions == "response") for name, prompt in ends
        )
        noised, denoised = exchanged(self.model, run_own, run_other)
        suffix = "_other" if self.against == "other_user" else ""
        return {
            f"noising{suffix}": Condition("own", noised, noised.ablated_losses, drawn=True),
            f"denoising{suffix}": Condition(self.against, denoised, denoised.ablated_losses, drawn=True),
        }

    def more(self) -> dict[str, Any]:
        return {"against": self.against}


def exchanged(model: HookedModel, own: ExampleRun, other: ExampleRun) -> tuple[ExampleRun, ExampleRun]:
    """The own run to be patched with the other's z (noising), and the reverse (denoising); nothing is run again where
    both kept their z.

    Args:
        model: a hooked model.
        own: a run of the response with the own profile.
        other: of the same response after another prompt.

    Raises:
        PromptError: positions other than `"response"` and prompts of unequal length.
    """
    return patch_between(model, own, other, Patch()), patch_between(model, other, own, Patch())
