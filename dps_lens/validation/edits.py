"""Runs in which sets of heads are edited in several conditions of every example, and the losses are measured."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from dps_lens.data import Example
from dps_lens.data.copied import copied_tokens
from dps_lens.scoring import ExampleRun
from dps_lens.validation.effects import SetEffects
from dps_lens.validation.work import HeldOutWork
from dps_lens.work import Run, Units


@dataclass(frozen=True)
class Condition:
    """A run that sets of heads are edited in.

    Attributes:
        full: the condition whose unedited NLL this is.
        clean: its clean run.
        edited: losses `[row pos]` of the response under sets of heads `[row layer head]`; None where only the
            unedited NLL is wanted.
        drawn: random sets are measured, too.
    """

    full: str
    clean: ExampleRun
    edited: Callable[[Bool[Tensor, "row layer head"]], Float64[Tensor, "row pos"]] | None = None
    drawn: bool = False


@dataclass
class EditWork(HeldOutWork):
    """A run that edits sets of heads in conditions of every example, and measures the losses."""

    @abstractmethod
    def conditions(self, key: str, example: Example) -> dict[str, Condition]:
        """What the sets are edited in."""

    def more(self) -> dict[str, Any]:
        """What else decides the result."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | self.more()

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """What one example gives: `full.…` [2], `chosen.…` [family k 2], `draws.…` [family k draw 2]."""
        example = self.by_key[key]
        chosen, random = self.masks(key)
        size = (len(self.ranked[0]), len(self.ks))
        copied = self.copied(example)
        unit: dict[str, Tensor] = {}
        for name, condition in self.conditions(key, example).items():
            clean = condition.clean.losses
            # Neutral text is not the user's response and copies nothing; where answers are compared, no token counts.
            weights = torch.zeros_like(clean) if name in ("neutral", "task") else copied
            unit[f"full.{condition.full}"] = _split(clean[None], weights)[0]
            if condition.edited is None:
                continue
            masks = torch.cat([chosen, random]) if condition.drawn else chosen
            change = _split(condition.edited(masks) - clean, weights)
            unit[f"chosen.{name}"] = change[: len(chosen)].reshape(*size, 2)
            if condition.drawn:
                unit[f"draws.{name}"] = change[len(chosen) :].reshape(*size, len(self.draws_of(key)), 2)
        return unit

    def copied(self, example: Example) -> Float64[Tensor, " pos"]:
        """1 for response tokens that end an n-gram of the response which the own profile holds.

        A number of several answers has no tokens to be told apart, and counts as not copied.
        """
        if self.compares:
            return torch.zeros(1, dtype=torch.float64)
        prompt = self.build(example, "own")
        start, stop = prompt.spans["profile"]
        return copied_tokens(prompt.response_tokens.tolist(), prompt.tokens[start:stop].tolist(), self.config.ngram)

    def run(self, run: Run) -> SetEffects:
        """Measure every example; finished ones are read from the run's folder."""
        run.open(self.fingerprint)
        self.fit(run)
        return self.collect_run(run)

    def collect_run(self, run: Run) -> SetEffects:
        """Measure every example in an open run."""
        units = run.units(self, list(self.by_key), "editing heads")
        return run.keep(self.collect(units, run.manifest))

    def collect(self, units: Units, manifest: dict[str, Any]) -> SetEffects:
        """Effects on the examples whose units were made."""
        made, examples = list(units.made.values()), [self.by_key[key] for key in units.made]
        owners = tuple(example.user_id for example in examples)

        def group(prefix: str) -> dict[str, list[Tensor]]:
            return {name[len(prefix) :]: [u[name] for u in made] for name in made[0] if name.startswith(prefix)}

        draws = {}
        for name, rows in group("draws.").items() if self.n_random else ():
            dealt = [
                dict(zip(self.draws_of(key), row.unbind(2), strict=True))
                for key, row in zip(units.made, rows, strict=True)
            ]
            draws[name] = stack_draws(dealt, owners, self.n_random)
        return SetEffects(
            tuple(self.ranked[0]),
            self.ks,
            owners,
            tuple(example.id for example in examples),
            {name: torch.stack(rows) for name, rows in group("full.").items()},
            {name: torch.stack(rows) for name, rows in group("chosen.").items()},
            draws,
            manifest,
        )


def stack_draws(rows: Sequence[Mapping[int, Tensor]], user_ids: Sequence[str], n_draws: int) -> Tensor:
    """`[draw user family k 2]` from each example's draws, `draw → [family k 2]`, means of a user's; draws that every
    user has."""
    by_user: dict[str, dict[int, list[Tensor]]] = {}
    for owner, dealt in zip(user_ids, rows, strict=True):
        for draw, row in dealt.items():
            by_user.setdefault(owner, {}).setdefault(draw, []).append(row)
    complete = [draw for draw in range(n_draws) if all(draw in own for own in by_user.values())]
    return torch.stack([torch.stack([torch.stack(own[draw]).mean(0) for own in by_user.values()]) for draw in complete])


def _split(losses: Float64[Tensor, "row pos"], copied: Float64[Tensor, " pos"]) -> Float64[Tensor, "row 2"]:
    """Means over the response: of all tokens, and of the copied ones with the rest counted as 0."""
    return torch.stack([losses.mean(-1), (losses * copied).mean(-1)], dim=-1)
