"""Ablate or patch the top K heads of several families on held-out examples, beside random heads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dps_lens.analysis.effects import CONDITIONS, SetEffects
from dps_lens.analysis.rankings import Family, Select
from dps_lens.analysis.set_sweep import Condition, EditSweep, ablated, neutral_prompt
from dps_lens.data import Example, PromptConfig, User
from dps_lens.errors import ScoreError
from dps_lens.families import shipped_paragraphs
from dps_lens.heads import HeadSet
from dps_lens.intervene import Ablation, Positions
from dps_lens.model import HookedModel
from dps_lens.runs import Engine
from dps_lens.scoring.branches import BatchSize
from dps_lens.scoring.sweep import Contrast, aligned_z, donors_of


def ablation_curve(
    model: HookedModel,
    users: Sequence[User],
    families: Mapping[str, Family],
    *,
    ks: Sequence[int] = (0, 1, 2, 5, 10, 20),
    n_random: int = 50,
    select: Select | Mapping[str, Select] = "global",
    exclude: Mapping[str, HeadSet] | None = None,
    ablation: Ablation | None = None,
    positions: Positions | None = None,
    max_examples: int | None = None,
    prompt: PromptConfig | None = None,
    controls: Sequence[str] = ("own", "no_profile"),
    ngram: int = 2,
    neutral: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    out: str | Path | None = None,
    force: bool = False,
    engine: Engine | None = None,
    progress: bool = True,
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
        exclude: family → heads that its ranking by scores may not hold, such as
            `{"preference": refs["induction"].top_share(0.02)}` (Yin & Steinhardt 2025, arXiv 2502.14010).
        ablation: `"zero"` or `"uniform"`; by default that of the scores.
        positions: where; by default those of the scores.
        max_examples: the newest so many evaluation examples of each user.
        prompt: how prompts are built; by default as for the scores.
        controls: conditions that random sets are measured in, out of `own`, `no_profile`, `other_user` and `neutral`.
        ngram: a response token counts as copied when it ends an n-gram of the response that the profile holds.
        neutral: texts to measure fluency on; by default prose of the package.
        seed: of folds, donors and random sets.
        batch_size: branches a batch.
        out: a run folder; a run that is started again there resumes.
        force: drop what `out` holds.
        engine: as in `score_heads`.
        progress: show a progress bar.

    Raises:
        ScoreError: scores were measured on one of these examples, or with other settings than asked for.
        HeadError: a ranking is shorter than the largest K.
    """
    if unknown := {*controls} - {*CONDITIONS}:
        raise ScoreError(f"ablation_curve: controls {sorted(unknown)} are unknown; use some of {', '.join(CONDITIONS)}")
    texts = tuple(neutral) if neutral is not None else shipped_paragraphs()
    if engine is not None:
        engine.start(model)
    sets = AblationSweep.of(
        "ablation_curve",
        model,
        users,
        families,
        ks,
        ablation=ablation,
        positions=positions,
        prompt=prompt,
        n_random=n_random,
        select=select,
        exclude=exclude,
        max_examples=max_examples,
        ngram=ngram,
        seed=seed,
        batch_size=batch_size,
        texts=texts,
        controls=tuple(controls),
    )
    if sets.ablation not in ("zero", "uniform"):
        raise ScoreError(
            f"ablation_curve: ablation {sets.ablation!r} is not offered here; use 'zero' or 'uniform', or "
            "patch_heads for 'patch'"
        )

    return sets.run(out, force, progress, engine)


@dataclass
class AblationSweep(EditSweep):
    """The sweep of `ablation_curve`."""

    texts: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()

    def conditions(self, number: int, example: Example) -> dict[str, Condition]:
        donor = donors_of(example, self.users, 1, self.seed)
        prompts = {"own": self.build(example, "own"), "no_profile": self.build(example, "none")}
        if donor:
            prompts["other_user"] = self.build(example, donor[0])
        if self.texts:
            prompts["neutral"] = neutral_prompt(self.model, self.texts[number % len(self.texts)])
        return {
            name: ablated(name, self.branches_of(built), drawn=name in self.controls) for name, built in prompts.items()
        }

    def more(self) -> dict[str, Any]:
        return {"neutral": list(self.texts), "controls": list(self.controls)}


def patch_heads(
    model: HookedModel,
    users: Sequence[User],
    families: Mapping[str, Family],
    *,
    ks: Sequence[int] = (1, 2, 5, 10, 20),
    n_random: int = 20,
    select: Select | Mapping[str, Select] = "global",
    exclude: Mapping[str, HeadSet] | None = None,
    positions: Positions | None = None,
    max_examples: int | None = None,
    prompt: PromptConfig | None = None,
    patch_from: Contrast = "no_profile",
    ngram: int = 2,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    out: str | Path | None = None,
    force: bool = False,
    engine: Engine | None = None,
    progress: bool = True,
) -> SetEffects:
    """Necessity and sufficiency of the top K heads: noising and denoising patches on evaluation examples.

    Noising puts the z of the run without profile into the run with it; denoising the reverse. Arguments as
    in `ablation_curve`.

    Args:
        patch_from: the other run: without profile, or with another user's.

    Raises:
        ScoreError: as `ablation_curve`.
        PromptError: positions other than `"response"` and prompts of unequal length.
    """
    if patch_from not in ("no_profile", "other_user"):
        raise ScoreError(f"patch_heads: patch_from {patch_from!r} is unknown; use 'no_profile' or 'other_user'")
    if patch_from == "other_user" and len(users) < 2:
        raise ScoreError("patch_heads: 'other_user' needs at least two users")
    if engine is not None:
        engine.start(model)
    sets = PatchSweep.of(
        "patch_heads",
        model,
        users,
        families,
        ks,
        ablation="patch",
        positions=positions,
        prompt=prompt,
        n_random=n_random,
        select=select,
        exclude=exclude,
        max_examples=max_examples,
        ngram=ngram,
        seed=seed,
        batch_size=batch_size,
        patch_from=patch_from,
    )
    return sets.run(out, force, progress, engine)


@dataclass
class PatchSweep(EditSweep):
    """The sweep of `patch_heads`."""

    patch_from: Contrast = "no_profile"

    def conditions(self, number: int, example: Example) -> dict[str, Condition]:
        own = self.build(example, "own")
        donor = donors_of(example, self.users, 1, self.seed) if self.patch_from == "other_user" else []
        other = self.build(example, donor[0] if donor else "none")
        suffix = " (other)" if donor else ""
        found = {}
        for name, full, base, source in (("noising", "own", own, other), ("denoising", self.patch_from, other, own)):
            values, where = aligned_z(self.model, base, source, self.positions)
            found[name + suffix] = ablated(full, self.branches_of(base), drawn=True, values=values, where=where)
        return found

    def more(self) -> dict[str, Any]:
        return {"patch_from": self.patch_from}
