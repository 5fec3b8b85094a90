"""Ablate the top K heads of several families on held-out examples, beside random heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dps_lens.data import Example, PromptConfig, User
from dps_lens.data.conditions import neutral_prompt, prompts_in
from dps_lens.data.examples import held_out_examples
from dps_lens.errors import ScoreError
from dps_lens.families.retrieval import shipped_paragraphs
from dps_lens.heads import HeadSet
from dps_lens.intervene import AblationLike, Patch
from dps_lens.literals import CONDITIONS, Select
from dps_lens.model import HookedModel
from dps_lens.scores import HeadScores
from dps_lens.selection import HeadSource, check_held_out
from dps_lens.validation.edits import Condition, EditWork
from dps_lens.validation.effects import SetEffects
from dps_lens.validation.work import HeldOutConfig
from dps_lens.work import Engine, Run, RunConfig


def ablation_curve(
    model: HookedModel,
    users: Sequence[User],
    families: Mapping[str, HeadSource],
    *,
    ks: Sequence[int] = (0, 1, 2, 5, 10, 20),
    n_random: int = 50,
    select: Select | Mapping[str, Select] = "global",
    ablation: AblationLike | None = None,
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    held_out_config: HeldOutConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> SetEffects:
    """Ablate the top K heads of every family on evaluation examples: with own profile, without, with another's.

    Args:
        model: a hooked model.
        users: their evaluation examples are used.
        families: name → scores of `score_heads` or `reference_heads`, a ranking (`HeadSet`), nested sets, or a
            ranking for each user (`user id → HeadSet`). Families that are not defined (NaN) are left out.
        ks: sizes of the sets.
        n_random: random sets for each family, user and K, of the same layers (the nearest where a layer has too
            few other heads) and disjoint from the family's set; spread over a user's examples, so that more
            examples cost no more draws.
        select: `"global"` ranks by the mean over users, by users in other folds where the tested users are in the
            scores; `"user"` ranks by each user's own discovery examples. One for all, or family → either.
        ablation: as in `score_heads`; by default that of the scores, and `"zero"` where they were patched.
        max_examples: the newest so many evaluation examples of each user.
        prompt_config: how prompts are built; by default as for the scores.
        held_out_config: rare settings: exclusions, positions, conditions of the random sets, neutral texts.
        seed: of folds, donors and random sets.
        out: a run folder; a run that is started again there resumes.
        engine: as in `score_heads`.
        run_config: force, rows of a batch, progress bars.

    Raises:
        ScoreError: scores were measured on one of these examples, or with other settings than asked for.
        HeadError: a ranking is shorter than the largest K.
    """
    run = Run(model, SetEffects, out, engine, run_config)
    work = AblationWork.of(
        "ablation_curve",
        model,
        users,
        families,
        ks,
        ablation=ablation,
        prompt_config=prompt_config,
        config=held_out_config,
        n_random=n_random,
        select=select,
        max_examples=max_examples,
        seed=seed,
        batch_size=run.config.batch_size,
    )
    return work.run(run)


def ablation_cost(
    model: HookedModel,
    users: Sequence[User],
    heads: HeadSet | HeadScores,
    *,
    k: int = 10,
    n_random: int = 20,
    ablation: AblationLike | None = None,
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    held_out_config: HeldOutConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> SetEffects:
    """Ablate one set of heads on evaluation examples, with and without profile: `.verdict()` says what it shows.

    `ablation_curve` of a single set, every random set of which is measured on every example.

    Args:
        heads: the chosen heads, or scores whose top `k` are taken, with the settings that they were made with.
        k: how many heads to take from scores.

    Raises:
        ScoreError: as `ablation_curve`.
    """
    run = Run(model, SetEffects, out, engine, run_config)
    settings: Mapping[str, HeadSource] = {"scores": heads} if isinstance(heads, HeadScores) else {}
    if isinstance(heads, HeadScores):
        check_held_out("ablation_cost", heads, held_out_examples("ablation_cost", users, max_examples))
    chosen = heads.top(k) if isinstance(heads, HeadScores) else heads
    work = AblationWork.of(
        "ablation_cost",
        model,
        users,
        {chosen.label or "heads": chosen},
        (len(chosen),),
        inherit=settings,
        ablation=ablation,
        prompt_config=prompt_config,
        config=held_out_config,
        n_random=n_random,
        select="global",
        max_examples=max_examples,
        seed=seed,
        batch_size=run.config.batch_size,
        spread=False,
        shown=("own", "no_profile"),
    )
    return work.run(run)


@dataclass
class AblationWork(EditWork):
    """The run of `ablation_curve`.

    Attributes:
        shown: conditions that are measured.
    """

    shown: tuple[str, ...] = CONDITIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := {*self.config.controls} - {*CONDITIONS}:
            raise ScoreError(
                f"{self.call}: controls {sorted(unknown)} are unknown; use some of {', '.join(CONDITIONS)}"
            )
        if isinstance(self.settings.ablation, Patch):
            raise ScoreError(f"{self.call}: 'patch' compares two runs; use patch_heads, or another ablation here")

    @property
    def texts(self) -> list[str]:
        """Neutral texts."""
        return list(self.config.neutral) if self.config.neutral is not None else list(shipped_paragraphs())

    def conditions(self, key: str, example: Example) -> dict[str, Condition]:
        prompts = {}
        for name in (name for name in self.shown if name != "neutral"):
            config = self.settings.prompt_config
            for prompt in prompts_in(self.model, example, name, self.users, seed=self.seed, config=config):
                prompts[name] = prompt
        if self.texts and "neutral" in self.shown:
            prompts["neutral"] = neutral_prompt(self.model, self.texts[self.places[key] % len(self.texts)])
        runs = {name: self.clean_run(prompt, name) for name, prompt in prompts.items()}
        return {
            name: Condition(name, clean, clean.ablated_losses, drawn=name in self.config.controls)
            for name, clean in runs.items()
        }

    def more(self) -> dict[str, Any]:
        neutral = {"neutral": self.texts} if "neutral" in self.shown else {}
        return {**neutral, "controls": list(self.config.controls)}
