"""Sets of heads that one half of the users chooses, by every finder, on runs that are made once."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

import dps_lens as dps
from dps_lens.data import User
from dps_lens.files import write_json
from dps_lens.finding import Conditional, Finder, Gates, Greedy, Rank
from dps_lens.finding.finder import Bounds, Fit
from dps_lens.finding.sets import Weighted, best, limits
from dps_lens.finding.trial import Trial
from dps_lens.finding.work import FindConfig, FindWork
from experiments.lib.harness import Prompts

ZERO, EXACT = "zero-PCS", "exact patch"
BOUNDED = ", bounded"
NESTED = ("greedy", "conditional")
"""Finders whose sets of smaller k are the beginnings of the largest one, bounds kept."""


@dataclass
class Half:
    """The users who choose, and what is asked of them.

    Attributes:
        out: folder in which sets and seconds are kept; what stands there is read.
        seconds: of processor time, by finder and K; `runs` and `costs` are the clean runs with their integrated scores.
    """

    model: dps.HookedModel
    users: Sequence[User]
    ks: tuple[int, ...]
    bounds: Bounds
    prompt: Prompts
    max_examples: int
    seed: int
    out: Path
    seconds: dict[str, float] = field(default_factory=dict)
    _memos: dict[str, dict[int, Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def sets(self) -> dict[str, dict[int, dps.HeadSet]]:
        """Finder → K → at most K heads, best first."""
        self._kept("runs", partial(self._none, "_trials"))
        self._kept("costs", partial(self._none, "_bounded"))
        found: dict[str, dict[int, dps.HeadSet]] = {}
        for name in (ZERO, EXACT):
            ranking = self._kept(name, partial(self._top, name, max(self.ks)))
            found[name] = {k: ranking[:k] for k in self.ks}
            found[name + BOUNDED] = {
                k: self._kept(f"{name}{BOUNDED}, {k}", partial(self._beginning, ranking[:k])) for k in self.ks
            }
        for finder in (Rank(), Gates(role_steps=0), Greedy(), Conditional()):
            for bounds, label in ((Bounds(), ""), (self.bounds, BOUNDED)):
                name, fits = finder.name + label, (max(self.ks),) if finder.name in NESTED else self.ks
                sets = {k: self._kept(f"{name}, {k}", partial(self._found, finder, bounds, k)) for k in fits}
                found[name] = {k: sets[k] if k in sets else sets[max(fits)][:k] for k in self.ks}
        return found

    @cached_property
    def rankings(self) -> dict[str, dps.HeadSet]:
        """All heads, best first, of the finders that give every head a number."""
        numel = self.model.cfg.n_layers * self.model.cfg.n_heads
        made: dict[str, Callable[[], dps.HeadSet]] = {
            ZERO: partial(self._top, ZERO, numel),
            EXACT: partial(self._top, EXACT, numel),
            "rank": lambda: best(self._fit(Rank(), Bounds(), numel).values, numel),
            "gates": lambda: best(self._fit(Gates(role_steps=0), Bounds(), max(self.ks)).values, numel),
        }
        return {name: self._kept(f"ranking of {name}", make) for name, make in made.items()}

    def spent(self, finder: str) -> float:
        """Seconds for all K, runs included; of a bounded search that goes on from what a free one measured, both."""
        free = finder.removesuffix(BOUNDED)
        parts = {finder}
        if finder not in (ZERO, EXACT):
            parts.add("runs")
        if finder != free:
            parts.add(free if free in (ZERO, EXACT, *NESTED) else "costs")
        return sum(seconds for name, seconds in self.seconds.items() if re.sub(r", \d+$", "", name) in parts)

    @property
    def examples(self) -> list[tuple[str, str]]:
        """User and id of the examples that chose."""
        return [(example.user_id, example.id) for example in self._work.examples]

    def as_found(self, heads: dps.HeadSet) -> dps.FoundHeads:
        """A set as the held-out calls take it: whole where it holds fewer heads than K."""
        cfg, (users, ids) = self.model.cfg, zip(*self.examples, strict=True)
        manifest = {"k": max(self.ks)}
        return dps.FoundHeads(
            heads, torch.zeros(cfg.n_layers, cfg.n_heads), example_ids=ids, user_ids=users, manifest=manifest
        )

    def _kept(self, name: str, make: Callable[[], dps.HeadSet]) -> dps.HeadSet:
        """A set from its file, or made now and timed."""
        kept, cfg = self.out / "sets" / f"{name.replace(', ', '_').replace(' ', '_')}.json", self.model.cfg
        if not kept.is_file():
            begun = time.process_time()
            heads = make()
            write_json(kept, {"heads": str(heads), "seconds": time.process_time() - begun})
        told = json.loads(kept.read_text(encoding="utf-8"))
        self.seconds[name] = told["seconds"]
        return dps.HeadSet(dps.HeadSet.parse(told["heads"]), name, (cfg.n_layers, cfg.n_heads))

    def _none(self, name: str) -> dps.HeadSet:
        """Make runs, to be timed."""
        getattr(self, name)
        return dps.HeadSet()

    def _top(self, name: str, k: int) -> dps.HeadSet:
        asked: dict[str, Any] = {"ablation": "patch", "against": "other_user"}
        if name == ZERO:
            asked = {"ablation": "zero", "against": "no_profile"}
        scores = dps.score_heads(
            self.model,
            self.users,
            **asked,
            method="exact",
            max_examples=self.max_examples,
            prompt_config=self.prompt.config(),
            score_config=dps.ScoreConfig(n_donors=1),
            seed=self.seed,
            out=self.out / "scores" / name.replace(" ", "_"),
        )
        return scores.top(k)

    def _found(self, finder: Finder, bounds: Bounds, k: int) -> dps.HeadSet:
        return self._fit(finder, bounds, k).heads

    @cached_property
    def _work(self) -> FindWork:
        """What makes the runs of `find_heads`; it knows the users of this half, and nobody else."""
        return FindWork(
            self.model,
            self.users,
            max(self.ks),
            finder=Rank(),
            against="other_user",
            bounds=self.bounds,
            max_examples=self.max_examples,
            prompt_config=self.prompt.config(),
            config=FindConfig(n_donors=1, n_bootstraps=0, folds=False),
            seed=self.seed,
        )

    @cached_property
    def _trials(self) -> list[Trial]:
        """With the integrated scores of what is removed."""
        made = [self._work.trial(key) for key in self._work.by_key]
        return [replace(trial, paths={"necessity": trial.path("necessity")}) for trial in made]

    @cached_property
    def _bounded(self) -> list[Trial]:
        """With those of the costs, too."""
        made = []
        for trial in self._trials:
            paths = dict(trial.paths)
            for name in limits(self.bounds):
                paths[name] = trial.path(name)
            made.append(replace(trial, paths=paths))
        return made

    @cached_property
    def _weights(self) -> torch.Tensor:
        (weights,) = self._work.weights(list(self._work.by_key)).values()
        return weights[None]

    def _fit(self, finder: Finder, bounds: Bounds, k: int) -> Fit:
        # A bounded search measures what the free one did, and more; others share nothing, so that times are their own.
        memos = self._memos.setdefault(finder.name if finder.name in NESTED else f"{finder}, {bounds}, {k}", {})
        trials = [
            replace(trial, memo=memos.setdefault(number, {}))
            for number, trial in enumerate(self._bounded if limits(bounds) else self._trials)
        ]
        return finder.fit(trials, self._weights, k, bounds, self.seed)[0]

    def _beginning(self, ranking: dps.HeadSet) -> dps.HeadSet:
        """The longest beginning that keeps the bounds."""
        sizes = range(len(ranking), 0, -1)
        weighted = next(Weighted.rows([replace(trial, memo={}) for trial in self._trials], self._weights))
        kept = weighted.keeps([ranking[:size] for size in sizes], self.bounds)
        return ranking[: next((size for size, keeps in zip(sizes, kept, strict=True) if keeps), 0)]
