"""The stages of 'demo', each kept in a folder of its own, and how long they take."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import typer

import dps_lens as dps
from dps_lens.cli.report import paper_name
from dps_lens.data import build_prompt
from dps_lens.errors import DataError, ScoreError
from dps_lens.families import shipped_paragraphs
from dps_lens.literals import Counterfactual
from dps_lens.model import runner_of
from dps_lens.scoring import CleanRun, single_heads
from dps_lens.scoring.paths import integrated


class Size(NamedTuple):
    """How much is measured."""

    examples: int
    held_out: int
    donors: int
    n_random: int
    gammas: tuple[float, ...]
    shown_users: int
    method: Literal["rank", "gates"]
    n_bootstraps: int
    neutral_words: int | None
    maps: bool


@dataclass
class Stages:
    """The stages of a demo.

    Attributes:
        model: that is looked into.
        users: whose heads are looked for.
        size: of everything.
        k: heads to find.
        folder: of the runs.
        report: the page.
        force: make everything anew.
    """

    model: dps.HookedModel
    users: list[dps.User]
    size: Size
    k: int
    folder: Path
    report: Path
    force: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def scored(self) -> bool:
        """Whether all users' scores are there."""
        there = (self.folder / f"{dps.HeadScores.stem}.json").is_file()
        return there and "shard" not in dps.HeadScores.load(self.folder).manifest

    def scores(self, part: dps.Shard | None = None, *, anew: bool = True) -> dps.HeadScores:
        """Of all users, or of a part; a folder is made anew once, by the first call that uses it."""
        return dps.score_heads(
            self.model,
            self.users,
            against=self._against,
            max_examples=self.size.examples,
            score_config=dps.ScoreConfig(n_donors=self.size.donors),
            out=self.folder,
            engine=part,
            run_config=dps.RunConfig(force=self.force and anew),
        )

    def found(self) -> dps.FoundHeads | None:
        """The set of heads; None where none keeps the bounds, which is said."""
        size = self.size
        try:
            return dps.find_heads(
                self.model,
                self.users,
                self.k,
                method=size.method,
                against=self._against,
                max_examples=size.examples,
                find_config=dps.FindConfig(n_donors=size.donors, n_bootstraps=size.n_bootstraps, neutral=self._neutral),
                out=self.folder / "found",
                run_config=dps.RunConfig(force=self.force),
            )
        except ScoreError as error:
            typer.echo(f"{error}; going on with the top {self.k} of the scores", err=True)
            return None

    def cost(self, scores: dps.HeadScores, found: dps.FoundHeads | None) -> dps.SetEffects:
        """What the heads that others chose do on held-out examples; where nobody else chose, those that there are."""
        return dps.ablation_cost(
            self.model,
            self.users,
            scores if found is None else found if found.folds else found.heads,
            k=self.k if found is None else None,
            n_random=self.size.n_random,
            max_examples=self.size.held_out,
            held_out_config=dps.HeldOutConfig(neutral=self._neutral),
            out=self.folder / "ablation",
            run_config=dps.RunConfig(force=self.force),
        )

    def maps(self) -> dict[str, dps.HeadScores]:
        """Beside the default score, the paper's own, and those of pairs: what tells a style apart, and a topic."""
        examples, anew = self.size.examples, dps.RunConfig(force=self.force)
        paper = dps.score_heads(
            self.model,
            self.users,
            ablation="zero",
            against=None,
            method="screened",
            max_examples=examples,
            out=self.folder / "pcs",
            run_config=anew,
        )
        found = {paper_name(paper): paper}
        for name, paired in self._pairs.items():
            found[f"{name}, by pairs"] = dps.score_heads(
                self.model,
                paired,
                objective="pair",
                max_examples=examples,
                score_config=dps.ScoreConfig(n_donors=self.size.donors),
                out=self.folder / name,
                run_config=anew,
            )
        return found

    def write(
        self,
        scores: "dps.HeadScores | Mapping[str, dps.HeadScores]",
        found: dps.FoundHeads | None = None,
        cost: dps.SetEffects | None = None,
        note: str = "",
        **more: Any,
    ) -> None:
        """The page of what there is."""
        families = {"found": found} if found is not None else None
        page = dps.explore(
            self.model, self.users, scores, k=self.k, families=families, cost=cost, **{"max_users": 0, **more}
        )
        replace(page, note=note).write(self.report, force=self.force)
        typer.echo(f"{self.report}, {self.seconds:.0f} s: {note or 'everything'}", err=True)

    def write_all(
        self,
        scores: "dps.HeadScores | Mapping[str, dps.HeadScores]",
        found: dps.FoundHeads | None,
        cost: dps.SetEffects,
    ) -> None:
        """The whole page, with texts."""
        self.write(
            scores,
            found,
            cost,
            gammas=self.size.gammas,
            ks=self._ks,
            max_users=self.size.shown_users,
            out=self.folder / "page",
            run_config=dps.RunConfig(force=self.force),
        )

    @cached_property
    def _pairs(self) -> dict[str, list[dps.User]]:
        """The users with another's text of the same topic, or of the same style, where they say which are theirs."""
        found = {}
        for name, same in (("styles", "topic"), ("topics", "style")) if self.size.maps else ():
            with suppress(DataError):  # no such labels, or nobody else who shares one
                found[name] = dps.make_pairs(self.users, same=same)
        return found

    @property
    def seconds(self) -> float:
        """Since the first stage."""
        return time.monotonic() - self.started

    @property
    def _against(self) -> Counterfactual:
        return "other_user" if len(self.users) > 1 else "no_profile"

    @cached_property
    def _neutral(self) -> list[str] | None:
        """Neutral texts of so many words; None for the package's own."""
        words = self.size.neutral_words
        return None if words is None else [" ".join(text.split()[:words]) for text in shipped_paragraphs()]

    @property
    def _ks(self) -> list[int]:
        return sorted({max(1, self.k // 2), self.k})

    def print_estimate(self) -> None:
        """Time a sample of what is run, sets of heads equally from every layer, and say how long the rest will take."""
        seconds = sum(
            (wanted - min(wanted, self._made(folder))) * each for folder, (wanted, each) in self._costs().items()
        )
        cfg = self.model.cfg
        about = f"{len(self.users)} users, {cfg.n_layers} layers × {cfg.n_heads} heads"
        typer.echo(f"{about}: about {max(seconds / 60, 0.1):.1f} minutes", err=True)

    def _made(self, folder: Path) -> int:
        """Units that are there; of heads that are found, whose fits are units too, all or none."""
        if folder.name == "found":
            return 10**9 if (folder / f"{dps.FoundHeads.stem}.json").is_file() else 0
        return len([*(folder / "units").glob("*.safetensors")])

    def _costs(self) -> dict[Path, tuple[int, float]]:
        """Units of each folder, and seconds of each."""
        size, cfg, config = self.size, self.model.cfg, dps.ScoreConfig()
        n_layers, n_heads = cfg.n_layers, cfg.n_heads
        prompt = build_prompt(self.model, self.users[0].discovery_examples()[-1])
        sample = single_heads(n_layers, n_heads)[::n_heads]
        for _ in range(2):  # the first round warms up
            times = [time.monotonic()]
            run = CleanRun(runner_of(self.model), prompt)
            times.append(time.monotonic())
            run.ablated(sample)
            times.append(time.monotonic())
            integrated(run, config.ig_steps)
            times.append(time.monotonic())
            dps.generate(self.model, prompt, rule="greedy", max_new_tokens=_TIMED)
            times.append(time.monotonic())
        clean, sweep, path, text = (after - before for before, after in pairwise(times))
        per_set, token = 2 * sweep / n_layers, (text - clean) / _TIMED  # a set may start at the first layer
        n_exact = config.exact_layers * n_heads + config.confirm * n_layers * n_heads
        paths = 1 + size.donors
        # Fits to all, without each of five folds, and to resamples: each of "rank" measures some sets where there is no
        # profile; those of "gates" share passes, some fifteen paths for six of them.
        fits = 6 + size.n_bootstraps
        fitting = fits * (2.5 * path if size.method == "gates" else 3 * per_set)
        length = self.users[0].task.max_new_tokens
        texts = (len(size.gammas) * len(self._ks) + 1) * clean + 2 * length * token * len(size.gammas)
        n = len(self.users)
        return {
            self.folder: (size.examples * n, (2 + size.donors) * clean + paths * path),
            self.folder / "found": (size.examples * n, (3 + size.donors) * clean + (paths + 2) * path + fitting),
            # Own, none, another user's and neutral; two of them are also patched.
            self.folder / "ablation": (size.held_out * n, 4 * clean + 6 * per_set * (size.n_random + 1)),
            self.folder / "pcs": (size.maps * size.examples * n, 2 * clean + n_exact * sweep / n_layers),
            **{self.folder / name: (size.examples * n, (2 + size.donors) * (clean + 2 * path)) for name in self._pairs},
            self.folder / "page" / "grid": (min(n, size.shown_users), texts),
        }


_TIMED = 8
"""Tokens that are written to time one."""
