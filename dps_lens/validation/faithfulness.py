"""How faithful to the model the top of a ranking is, at every size: held-out runs with all other heads patched."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.data import PromptConfig, User
from dps_lens.data.conditions import prompts_in
from dps_lens.errors import HeadError, ScoreError
from dps_lens.heads import HeadSet
from dps_lens.intervene import Patch, Zero
from dps_lens.literals import AGAINST, Against, Select
from dps_lens.model import HookedModel, ModelConfig
from dps_lens.scores import HeadScores
from dps_lens.scoring.sweep import patch_between
from dps_lens.selection import HeadSource, Rankings, random_rankings, rankings
from dps_lens.validation.circuits import Faithfulness
from dps_lens.validation.work import HeldOutConfig, HeldOutWork
from dps_lens.work import Engine, Run, RunConfig

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The published shares, `MIB_circuit_track/evaluation.py` of github.com/hannamw/MIB-circuit-track."""


def faithfulness(
    model: HookedModel,
    users: Sequence[User],
    families: Mapping[str, HeadSource],
    *,
    against: Against = "other_user",
    sizes: Sequence[float] = SIZES,
    n_random: int = 39,
    select: Select | Mapping[str, Select] = "global",
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    held_out_config: HeldOutConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> Faithfulness:
    """The faithfulness curves of the Mechanistic Interpretability Benchmark (arXiv 2504.13151), for rankings of heads.

    The circuit C of a size is that share of all heads, rounded down, from the top of a ranking. In the run with the
    user's own profile every head outside C gets its z from a run of the same response with another profile, and
    `f = (m(C) − m(∅)) / (m(M) − m(∅))`, m being minus the NLL, ∅ no head kept and M the model as it is. MLPs are
    never patched and belong to every circuit. `.areas()` gives CPR, the area under f, and CMD, that of |1 − f|.

    Args:
        model: a hooked model.
        users: their evaluation examples are used.
        families: name → scores of `score_heads` or `reference_heads`, a ranking (`HeadSet`, best head first), or a
            ranking for each user. Sizes that a ranking of a few heads does not reach are NaN for it, and so are its
            areas. Families that are not defined (NaN) are left out.
        against: where patched heads take their z from: a run with another user's profile, or without one.
        sizes: shares of all heads, in growing order, by default the published ones; areas are over these.
        n_random: rankings at random of all heads, each measured with every example; 19 allow a p, 39 a range.
        select: as in `ablation_curve`: users are tested with heads that others chose, or with `"user"` by their own
            discovery examples.
        max_examples: the newest so many evaluation examples of each user.
        prompt_config: how prompts are built; by default as for the scores.
        held_out_config: rare settings: exclusions, positions, objective.
        seed: of folds, donors and random rankings.
        out: a run folder; a run that is started again there resumes.
        engine: as in `score_heads`.
        run_config: force, rows of a batch, progress bars.

    Raises:
        ScoreError: scores were measured on one of these examples, or with other settings than asked for; there is
            nobody else to take a profile from; sizes are no growing shares.
        HeadError: a ranking does not even reach the smallest size.
        PromptError: positions other than `"response"` and prompts of unequal length.
    """
    _check("faithfulness", users, families, against, sizes)
    run = Run(model, Faithfulness, out, engine, run_config)
    work = FaithfulnessWork.of(
        "faithfulness",
        model,
        users,
        families,
        [heads_in(size, model.cfg.n_layers * model.cfg.n_heads) for size in sizes],
        ablation="patch",
        prompt_config=prompt_config,
        config=held_out_config,
        n_random=n_random,
        select=select,
        max_examples=max_examples,
        seed=seed,
        batch_size=run.config.batch_size,
        spread=False,
        against=against,
        sizes=tuple(map(float, sizes)),
    )
    return work.run(run)


def heads_in(size: float, n_heads: int) -> int:
    """How many of all heads a share is, rounded down as published.

    >>> heads_in(0.02, 270), heads_in(0.29, 100)
    (5, 29)
    """
    return int(size * n_heads + 1e-9)  # 0.29 · 100 is 28.999… in binary


def _check(
    call: str, users: Sequence[User], families: Mapping[str, HeadSource], against: str, sizes: Sequence[float]
) -> None:
    if against not in AGAINST:
        raise ScoreError(f"{call}: against {against!r} is unknown; use 'other_user' or 'no_profile'")
    if against == "other_user" and len(users) < 2:
        raise ScoreError(f"{call}: against='other_user' needs at least two users; give more, or against='no_profile'")
    growing = all(one < other for one, other in itertools.pairwise(sizes))
    if len(sizes) < 2 or not growing or not (sizes[0] >= 0 and sizes[-1] <= 1):
        raise ScoreError(
            f"{call}: sizes {list(sizes)} are no growing shares of all heads; give two or more from 0 to 1, such as "
            "(0.01, 0.1, 1)"
        )
    for name, family in families.items():
        if not isinstance(family, (HeadScores, HeadSet, Mapping)) and isinstance(family, Sequence):
            raise ScoreError(
                f"{call}: family {name!r} is a list of sets, which rank no heads inside them; give one HeadSet, best "
                "head first"
            )


@dataclass
class FaithfulnessWork(HeldOutWork):
    """The run of `faithfulness`; `ks` are the numbers of heads of the sizes."""

    against: Against = "other_user"
    sizes: tuple[float, ...] = SIZES

    @cached_property
    def ranked(self) -> tuple[Rankings, dict[str, str]]:
        """One ranking of every family and user, as long as the largest size that the family reaches."""
        asked = (self.families, self.users, (0,), self.select, self.config.exclude, self.seed)
        empty, undefined = rankings(self.call, *asked)
        return {name: self._longest(name) for name in empty}, undefined

    def _longest(self, name: str) -> dict[str, list[HeadSet]]:
        *larger, smallest = sorted({k for k in self.ks if k} or {0}, reverse=True)
        for k in larger:
            with suppress(HeadError):
                return self._top(name, k)
        return self._top(name, smallest)

    def _top(self, name: str, k: int) -> dict[str, list[HeadSet]]:
        exclude = {name: self.config.exclude[name]} if name in self.config.exclude else None
        select = self.select if isinstance(self.select, str) else self.select.get(name, "global")
        sets, _ = rankings(self.call, {name: self.families[name]}, self.users, (k,), select, exclude, self.seed)
        if any(len(heads) < k for of_user in sets[name].values() for heads in of_user):
            raise HeadError(f"{self.call}: family {name!r} ranks fewer than {k} heads; lower sizes")
        if k < max(self.ks):
            size = max(size for size, count in zip(self.sizes, self.ks, strict=True) if count == k)
            warn(
                f"{self.call}: family {name!r} ranks fewer heads than sizes above {size:g} ask for; it has no f there, "
                "and no areas",
                stacklevel=2,
            )
        return sets[name]

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"against": self.against, "sizes": self.sizes}

    @cached_property
    def random(self) -> Int[Tensor, "draw layer head"]:
        """The places of all heads in random rankings."""
        cfg = self.model.cfg
        places = [places_of(heads, cfg) for heads in random_rankings(self.model, self.n_random, self.seed)]
        return torch.stack(places) if places else torch.zeros(0, cfg.n_layers, cfg.n_heads, dtype=torch.long)

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """What one example gives: losses `full` [], `empty` [], `circuits` [family size], `random` [draw size]."""
        example, config = self.by_key[key], self.settings.prompt_config
        own = self.build(example, "own")
        (other,) = prompts_in(self.model, example, self.against, self.users, seed=self.seed, config=config)
        keep_z = self.settings.positions == "response"
        base, source = (
            self.clean_run(prompt, name, ablation=Zero(), keep_z=keep_z)
            for name, prompt in (("own", own), (self.against, other))
        )
        clean = patch_between(self.model, base, source, Patch())
        ranked = [sets[example.user_id][0] for sets in self.ranked[0].values()]
        places = torch.cat([torch.stack([places_of(heads, self.model.cfg) for heads in ranked]), self.random])
        sizes = torch.tensor(self.ks)
        kept = (places[:, None] < sizes[:, None, None]).flatten(0, 1)
        # Circuits that are alike share one row, the empty one is among them: f is 0 and 1 without rounding.
        rows, of_circuit = torch.cat([torch.zeros_like(kept[:1]), kept]).unique(dim=0, return_inverse=True)
        losses = clean.ablated(~rows)[of_circuit]
        by_ranking = losses[1:].reshape(len(places), len(sizes))
        short = torch.tensor([len(heads) for heads in ranked])[:, None] < sizes
        return {
            "full": torch.tensor(clean.value, dtype=torch.float64),
            "empty": losses[0],
            "circuits": by_ranking[: len(ranked)].masked_fill(short, float("nan")),
            "random": by_ranking[len(ranked) :],
        }

    def run(self, run: Run) -> Faithfulness:
        """Measure every example; finished ones are read from the run's folder."""
        run.open(self.fingerprint)
        units = run.units(self, list(self.by_key), "patching heads")
        examples = [self.by_key[key] for key in units.made]
        made = {
            name: torch.stack([unit[name] for unit in units.made.values()])
            for name in ("full", "empty", "circuits", "random")
        }
        return run.keep(
            Faithfulness(
                tuple(self.ranked[0]),
                self.sizes,
                self.ks,
                tuple(example.user_id for example in examples),
                tuple(example.id for example in examples),
                **made,
                manifest=run.manifest,
            )
        )


def places_of(heads: HeadSet, cfg: ModelConfig) -> Int[Tensor, "layer head"]:
    """The place of every head of the model in a ranking, from 0; beyond all sizes where it is not ranked.

    Raises:
        HeadError: a head lies outside the model.
    """
    mask = heads.mask(cfg)
    places = torch.full(mask.shape, mask.numel())
    layers, numbers = torch.tensor([tuple(head) for head in heads], dtype=torch.long).reshape(-1, 2).T
    places[layers, numbers] = torch.arange(len(heads))
    return places
