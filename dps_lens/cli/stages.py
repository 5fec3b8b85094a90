"""The stages of 'demo', each kept in a folder of its own."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import typer

import dps_lens as dps
from dps_lens.cli.report import paper_name
from dps_lens.cli.sizes import Size
from dps_lens.errors import DataError, ScoreError
from dps_lens.families import shipped_paragraphs
from dps_lens.literals import Counterfactual


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
        for name, paired in self.pairs.items():
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
            ks=self.ks,
            max_users=self.size.shown_users,
            out=self.folder / "page",
            run_config=dps.RunConfig(force=self.force),
        )

    @cached_property
    def pairs(self) -> dict[str, list[dps.User]]:
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
    def ks(self) -> list[int]:
        """Numbers of heads that texts are steered with."""
        return sorted({max(1, self.k // 2), self.k})
