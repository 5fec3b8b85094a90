"""What ablating sets of heads changes, in any number of conditions of an example; resumable."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

import dps_lens as dps
from dps_lens.data import Example, User
from dps_lens.data.examples import unit_key
from dps_lens.model import HookedModel, describe_model
from dps_lens.progress import progress_bar
from dps_lens.runs import RunFolder, kept
from dps_lens.scores import HeadScores
from dps_lens.scoring import CleanRun
from dps_lens.selection import random_sets, rankings


class Changes(NamedTuple):
    """By condition: what each row's heads cost when ablated, and the NLL of the full model, nats per token."""

    effects: dict[str, Float64[Tensor, "example row"]]
    nll: dict[str, Float64[Tensor, " example"]]


def changes(
    model: HookedModel,
    examples: Sequence[Example],
    conditions: Callable[[Example], Iterator[tuple[str, CleanRun]]],
    masks: Callable[[Example], Bool[Tensor, "row layer head"]],
    about: Mapping[str, Any],
    out: Path,
) -> Changes:
    """Measure every condition of every example; `about` says what decides the numbers, beside model and heads."""
    heads = repr([masks(example).flatten(1).nonzero().tolist() for example in examples])
    settings = {"heads": hashlib.sha256(heads.encode()).hexdigest()[:16], "model": describe_model(model)}
    settings["examples"] = [unit_key(example) for example in examples]
    folder, units = RunFolder(out, settings | dict(about)), []

    def unit(example: Example) -> dict[str, Tensor]:
        found = {}
        for name, branches in conditions(example):
            found[name] = branches.ablated(masks(example)) - branches.nll
            found[f"nll.{name}"] = torch.tensor(branches.nll, dtype=torch.float64)
        return found

    for example in progress_bar(examples, desc=out.name, unit="example"):
        units.append(kept(folder, unit_key(example), partial(unit, example)))
    names = [name for name in units[0] if not name.startswith("nll.")]
    return Changes(
        {name: torch.stack([found[name] for found in units]) for name in names},
        {name: torch.stack([found[f"nll.{name}"] for found in units]) for name in names},
    )


def cross_fitted(scores: HeadScores, users: Sequence[User], k: int, seed: int) -> dict[str, dps.HeadSet]:
    """For each user the top `k` of users in other folds."""
    found, _ = rankings("experiments", {"heads": scores}, users, (k,), seed=seed)
    return {user: sets[0] for user, sets in found["heads"].items()}


def with_random(model: HookedModel, heads: dps.HeadSet, n: int, seed: int) -> Bool[Tensor, "row layer head"]:
    """The heads, and below them random sets of the same layers."""
    return torch.stack([one.mask(model.cfg) for one in (heads, *random_sets(model, heads, n, seed))])
