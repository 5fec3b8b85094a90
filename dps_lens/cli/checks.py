"""What commands check before they start."""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from dps_lens.extensions import is_path, load_object

if TYPE_CHECKING:
    from dps_lens.data import User
    from dps_lens.families import Family
    from dps_lens.finding import Finder
    from dps_lens.found import FoundHeads
    from dps_lens.heads import HeadSet
    from dps_lens.intervene import AblationLike
    from dps_lens.model import HookedModel
    from dps_lens.result import Result
    from dps_lens.scores import HeadScores
    from dps_lens.scoring import ObjectiveLike
    from dps_lens.steering.rules import RuleLike

N = TypeVar("N", int, float)


def with_discovery(command: str, users: "list[User]", *, strict: bool = False) -> "list[User]":
    """The users with at least one discovery example; says how many are left out, or refuses that."""
    from dps_lens.data.examples import left_out, with_examples

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said in a line of its own
        kept = with_examples(command, users, strict=strict)
    if len(kept) < len(users):
        typer.echo(f"{left_out(users, kept)}, with too short a history to find heads on", err=True)
    return kept


def template_kwargs(text: str | None) -> dict[str, Any]:
    """Keywords of the chat template."""
    from dps_lens.errors import PromptError

    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise PromptError(f"--chat-template-kwargs {text!r} is not valid JSON ({error.msg})") from None
    if not isinstance(found, dict):
        raise PromptError(f"--chat-template-kwargs {text!r} is no JSON object")
    return found


def heads_of(run: Path) -> "HeadScores | FoundHeads":
    """What a run folder of 'score' or 'find' holds."""
    from dps_lens.found import load_heads

    return load_heads(run)


def first_of(heads: "HeadScores | FoundHeads", k: int | None) -> "HeadSet":
    """The first k heads; by default 10, of a set that was found the whole set."""
    from dps_lens.found import FoundHeads

    if isinstance(heads, FoundHeads) and k is None:
        return heads.heads
    return heads.top(10 if k is None else k)


def sizes_of(heads: "HeadScores | FoundHeads", sizes: Sequence[int]) -> list[int]:
    """Sizes of sets; of a set that was found, up to what it was asked for."""
    from dps_lens.found import FoundHeads

    return [size for size in sizes if size < heads.k] + [heads.k] if isinstance(heads, FoundHeads) else list(sizes)


def check_same_model(command: str, scores: "Result", model: "HookedModel") -> None:
    """Refuse scores, heads or vectors of another model."""
    from dps_lens.errors import ScoreError
    from dps_lens.model import describe_model

    found, wanted = describe_model(model), scores.manifest.get("model", {})
    if (found["name"], found["n_layers"], found["n_heads"]) != tuple(
        wanted.get(key) for key in ("name", "n_layers", "n_heads")
    ):
        raise ScoreError(
            f"{command}: the run is of {wanted.get('name')!r}, loaded is {found['name']!r}; give its --model"
        )


def words(text: str) -> list[str]:
    """Comma-separated names; commas inside brackets separate arguments."""
    return [word.strip() for word in re.split(r",(?![^(]*\))", text) if word.strip()]


def families(kinds: str) -> "list[str | Family]":
    """Families by name, and those of somebody's own."""
    from dps_lens.families import Family

    return [load_object(kind, Family) if is_path(kind) else kind for kind in words(kinds)]


def ablation_of(text: str | None) -> "AblationLike | None":
    """An ablation by name or import path."""
    if text is None or not is_path(text):
        return text
    from dps_lens.intervene import Ablation

    return load_object(text, Ablation)


def only_of(command: str, users: "Sequence[User]", ids: Sequence[str] | None) -> "list[User]":
    """The users, of whom only some have evaluation examples, where that was asked for."""
    from dps_lens.errors import DataError

    if not ids:
        return list(users)
    known = [user.id for user in users]
    if missing := [one for one in ids if one not in known]:
        raise DataError(f"{command}: --only {missing[0]} is not among the users, {', '.join(known)[:200]}")
    warnings.filterwarnings("ignore", message=".*without an evaluation example")  # as was asked for
    return [user if user.id in ids else replace(user, examples=()) for user in users]


def paired(users: "Sequence[User]", pairs: str | None) -> "list[User]":
    """The users, with rejected answers of others where that was asked for."""
    from dps_lens.data import make_pairs

    return list(users) if pairs is None else make_pairs(users, same=None if pairs == "any" else pairs)


def objective_named(text: str | None) -> "ObjectiveLike | None":
    """An objective by name or import path."""
    if text is None or not is_path(text):
        return text
    from dps_lens.scoring import Objective

    return load_object(text, Objective)


def finder_of(text: str) -> "Finder":
    """A finder by name, or one of somebody's own."""
    from dps_lens.finding import Finder, find_finder

    return load_object(text, Finder) if is_path(text) else find_finder(text)  # type: ignore[arg-type]  # it refuses others


def rule_of(text: str) -> "RuleLike":
    """A rule by name, or a term of somebody's own."""
    if not is_path(text):
        return text
    from dps_lens.steering.terms import Term

    return load_object(text, Term)


def numbers(option: str, text: str, kind: type[N]) -> list[N]:
    """Comma-separated numbers."""
    from dps_lens.errors import ScoreError

    try:
        return [kind(word) for word in words(text)]
    except ValueError:
        example = "1,5,10" if kind is int else "0.5,1,2"
        raise ScoreError(f"--{option} {text!r} is not a list of numbers; write {example}") from None
