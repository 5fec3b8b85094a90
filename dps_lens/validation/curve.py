"""Ablate the top K heads of several families on held-out examples, beside random heads."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dps_lens.data import Example, Prompt, PromptConfig, User
from dps_lens.data.conditions import neutral_prompt, prompts_in
from dps_lens.data.examples import held_out_examples
from dps_lens.errors import ScoreError
from dps_lens.families.retrieval import shipped_paragraphs
from dps_lens.found import FoundHeads
from dps_lens.heads import HeadSet
from dps_lens.intervene import AblationLike, Patch, Zero
from dps_lens.literals import AGAINST, CONDITIONS, PATCHED, Select
from dps_lens.model import HookedModel
from dps_lens.scores import HeadScores
from dps_lens.scoring import ExampleRun, nll_run
from dps_lens.selection import HeadSource, check_held_out
from dps_lens.validation.edits import Condition, EditWork
from dps_lens.validation.effects import SetEffects
from dps_lens.validation.patch import exchanged
from dps_lens.validation.work import HeldOutConfig, Self
from dps_lens.work import Engine, Run, RunConfig

_ENDS = ("own", "other_user")
"""What is patched between."""


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
    """Ablate the top K heads of every family on evaluation examples, and patch them between users' runs.

    Heads are ablated with the own profile, without one, with another user's, and on neutral text: what is removed of
    the gain over another user and over no profile stands beside what it costs the task and neutral text. With two users
    or more, the same sets are patched between the own run and another user's, too: `necessity_other` and
    `sufficiency_other`, as of `patch_heads(against="other_user")`.

    The passes: an example's four prompts are run once each, and every set, chosen or random, is then measured in six
    conditions, of which the two patched ones are a third. `HeldOutConfig(patched=False)` leaves these out;
    `HeldOutConfig(controls=("own", "no_profile", "other_user"))` halves the passes of random sets, and still tells
    what is removed, and what the task costs, from what random heads do.

    Args:
        model: a hooked model.
        users: their evaluation examples are used.
        families: name → scores of `score_heads` or `reference_heads`, a ranking (`HeadSet`), nested sets, or a
            ranking for each user (`user id → HeadSet`). Families that are not defined (NaN) are left out. Of
            `find_heads`, each user is tested with the set that others chose, whole where it holds fewer than K.
        ks: sizes of the sets.
        n_random: random sets for each family, user and K, of the same layers (the nearest where a layer has too
            few other heads) and disjoint from the family's set; spread over a user's examples, so that more
            examples cost no more draws.
        select: `"global"` ranks by the mean over users, by users in other folds where the tested users are in the
            scores; `"user"` ranks by each user's own discovery examples. One for all, or family → either.
        ablation: as in `score_heads`; by default that of the scores, and `"zero"` where they were patched.
        max_examples: the newest so many evaluation examples of each user.
        prompt_config: how prompts are built; by default as for the scores.
        held_out_config: rare settings: exclusions, positions, patches, conditions of the random sets, neutral texts.
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
    heads: HeadSet | HeadScores | FoundHeads,
    *,
    k: int | None = None,
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
    """Ablate and patch one set of heads on evaluation examples: `.verdict()` says what it costs and what it removes.

    `ablation_curve` of a single set, every random set of which is measured on every example, in each of its conditions.

    Args:
        heads: the chosen heads; a set that `find_heads` found, each user tested with what others chose; or scores
            whose top `k` are taken, also where the same users' discovery examples chose them (`ablation_curve` tests
            each user with what others chose). Of the latter two, the settings that they were made with are taken, too.
        k: how many heads to take from scores, 10 by default; sets are tested whole.

    Raises:
        ScoreError: as `ablation_curve`.
    """
    if k is not None and not isinstance(heads, HeadScores):
        raise ScoreError("ablation_cost: k is of scores; a set is tested whole, so give its beginning, heads[:k]")
    run = Run(model, SetEffects, out, engine, run_config)
    if not isinstance(heads, HeadSet):
        check_held_out("ablation_cost", heads, held_out_examples("ablation_cost", users, max_examples))
    work = AblationWork.of_one_set(
        model,
        users,
        heads,
        k=k,
        n_random=n_random,
        ablation=ablation,
        prompt_config=prompt_config,
        config=held_out_config,
        max_examples=max_examples,
        seed=seed,
        batch_size=run.config.batch_size,
    )
    return work.run(run)


@dataclass
class AblationWork(EditWork):
    """The run of `ablation_curve`."""

    @classmethod
    def of_one_set(
        cls: type[Self],
        model: HookedModel,
        users: Sequence[User],
        heads: HeadSet | HeadScores | FoundHeads,
        *,
        k: int | None = None,
        max_examples: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Self:
        """The run of `ablation_cost`."""
        tested: dict[str, HeadSource]
        if isinstance(heads, FoundHeads):
            tested, size = {"found": heads}, heads.k
        else:
            chosen = heads.top(10 if k is None else k) if isinstance(heads, HeadScores) else heads
            tested, size = {chosen.label or "heads": chosen}, len(chosen)
        return cls.of(
            "ablation_cost",
            model,
            users,
            tested,
            (size,),
            inherit={} if isinstance(heads, HeadSet) else {"scores": heads},
            select="global",
            max_examples=max_examples,
            seed=seed,
            spread=False,
            **options,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*CONDITIONS, *PATCHED)
        if unknown := {*self.config.controls} - {*known}:
            raise ScoreError(f"{self.call}: controls {sorted(unknown)} are unknown; use some of {', '.join(known)}")
        if isinstance(self.settings.ablation, Patch):
            raise ScoreError(f"{self.call}: 'patch' compares two runs; use patch_heads, or another ablation here")

    @property
    def texts(self) -> list[str]:
        """Neutral texts."""
        return list(self.config.neutral) if self.config.neutral is not None else list(shipped_paragraphs())

    @property
    def patched(self) -> bool:
        """Whether sets are patched, too."""
        return self.config.patched and self.settings.positions == "response"

    def prompts(self, key: str, example: Example) -> dict[str, Prompt]:
        """What an example is read in, by condition."""
        found = {}
        for name in ("own", *AGAINST):
            config = self.settings.prompt_config
            for prompt in prompts_in(self.model, example, name, self.users, seed=self.seed, config=config):
                found[name] = prompt
        if self.texts:
            found["neutral"] = neutral_prompt(self.model, self.texts[self.places[key] % len(self.texts)])
        return found

    def clean_runs(self, key: str, example: Example) -> Iterator[tuple[str, ExampleRun]]:
        """The runs that are edited, by condition, and those that patches start from, as `"from own"`; made one by one.

        The latter are the same runs, but for what edits attention patterns: that runs another attention, whose run no
        patch may start from.
        """
        prompts = self.prompts(key, example)
        patched = self.patched and "other_user" in prompts
        shared = self.settings.ablation.site == Patch.site
        for name, prompt in prompts.items():
            run = self.clean_run(prompt, name, keep_z=patched and shared and name in _ENDS)
            yield name, run
            if patched and shared and name in _ENDS:
                yield f"from {name}", run
        for name in _ENDS if patched and not shared else ():
            yield f"from {name}", self.clean_run(prompts[name], name, ablation=Zero(), keep_z=True)

    def conditions(self, key: str, example: Example) -> dict[str, Condition]:
        runs = dict(self.clean_runs(key, example))
        ends = [runs.pop(f"from {name}") for name in _ENDS if f"from {name}" in runs]
        edited = {name: (name, run) for name, run in runs.items()}
        if ends:
            edited |= dict(zip(PATCHED, zip(_ENDS, exchanged(self.model, *ends), strict=True), strict=True))
        found = {
            name: Condition(full, run, run.ablated_losses, drawn=name in self.config.controls)
            for name, (full, run) in edited.items()
        }
        if self.compares:
            # Whatever answers are compared by, what a set costs is what it does to the model's language.
            task = nll_run(runs["no_profile"])
            found["task"] = Condition("task", task, task.ablated_losses, drawn=found["no_profile"].drawn)
        return found

    def more(self) -> dict[str, Any]:
        return {"neutral": self.texts, "controls": list(self.config.controls), "patched": self.config.patched}
